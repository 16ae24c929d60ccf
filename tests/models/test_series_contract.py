"""What every forecaster promises, over the registry: a new family is covered by being registered."""

import math

import pytest
import torch
from support.series import names, randomised, some_series

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.models import create_model, load, save_model
from rookery.registry import configure, families

every = pytest.mark.parametrize("name", names())
scaled = pytest.mark.parametrize("name", [name for name in names() if name != "dlinear-test"])  # it reads values as is
streaming = pytest.mark.parametrize("name", [name for name in names() if create_model(name).streams])

LENGTH = 40


@every
def test_every_parameter_gets_a_gradient(name):
    model = randomised(name)
    predicted, actual = model.pairs(some_series(3, 48), 32)
    predicted[~actual.isnan()].square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@every
def test_a_series_alone_equals_the_series_in_a_batch(name):
    model, series = randomised(name), some_series(3, LENGTH)
    together = model.forecast(series, 20)
    for row in range(3):
        torch.testing.assert_close(model.forecast(series[row], 20)[0], together[row], rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 33, 70])
@pytest.mark.parametrize("mode", ["stream", "window"])
def test_any_length_and_horizon_work(name, length, mode):
    model = randomised(name)
    for horizon in (1, 7, 30):
        found = model.forecast(some_series(2, length), horizon, mode)
        assert found.shape == (2, horizon, model.config.outputs)
        assert found.isfinite().all()


@every
def test_a_short_horizon_is_the_start_of_a_long_one(name):
    model, series = randomised(name), some_series(2, LENGTH)
    torch.testing.assert_close(model.forecast(series, 9), model.forecast(series, 50)[:, :9], rtol=1e-12, atol=0)


@scaled
def test_forecasts_move_and_stretch_with_the_series(name):
    model, series = randomised(name), some_series(2, LENGTH) * 10
    got, want = model.forecast(3 * series + 100, 20), 3 * model.forecast(series, 20) + 100
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@every
def test_padding_with_missing_points_on_the_left_changes_nothing(name):
    model, short = randomised(name), some_series(1, 21)
    padded = torch.cat([torch.full((1, 30), math.nan, dtype=torch.float64), short], dim=1)
    batch = torch.cat([padded, some_series(1, 51, seed=5)])
    torch.testing.assert_close(model.forecast(batch, 12)[0], model.forecast(short, 12)[0], rtol=1e-9, atol=1e-9)


@scaled
def test_a_constant_series_goes_on_as_it_was(name):
    assert (randomised(name).forecast(torch.full((1, LENGTH), 7.25, dtype=torch.float64), 30) == 7.25).all()


@every
def test_the_callers_series_is_not_changed(name):
    series = some_series(2, LENGTH)
    before = series.clone()
    randomised(name).forecast(series, 10)
    assert torch.equal(series, before)


@every
def test_quantiles_rise_with_the_level(name):
    found = randomised(name).forecast(some_series(4, LENGTH), 30)
    assert (found.diff(dim=-1) >= 0).all()


@every
def test_bad_series_are_refused_with_a_reason(name):
    model, series = randomised(name), some_series(2, LENGTH)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        model.forecast(series, 0)
    with pytest.raises(ValueError, match="point 3 of series 1 is infinite"):
        model.forecast(series.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(math.inf).double()), 5)
    with pytest.raises(ValueError, match="at least one point"):
        model.forecast(series[:, :0], 5)


@every
def test_a_saved_model_is_the_same_when_loaded(name, tmp_path):
    model, series = randomised(name, dtype=torch.float32), some_series(2, LENGTH)
    save_model(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").eval()
    assert again.config == model.config
    assert torch.equal(again.forecast(series, 20), model.forecast(series, 20))


@every
def test_shapes_alone_give_the_sizes(name):
    family, config = configure(name)
    found = family.config_from_shapes(family.tensor_shapes(config))
    for field in ("hidden_size", "num_hidden_layers"):
        assert getattr(found, field) == getattr(config, field)


@every
def test_a_family_knows_its_tensors(name):
    family, config = configure(name)
    model = create_model(name)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == family.tensor_shapes(config)
    claimed = [other.name for other in families().values() if other.recognise(family.tensor_shapes(config))]
    assert claimed == [family.name]


@every
def test_the_same_seed_gives_the_same_weights(name):
    one, same = (create_model(name, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], same[key]) for key in one)


@every
def test_a_file_says_what_it_is(name, tmp_path):
    save_model(create_model(name), tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").family.kind == "series"


# the state


@streaming
def test_patches_one_by_one_equal_all_at_once(name):
    model = randomised(name)
    patches = some_series(2, 9 * model.config.patch_length).unflatten(1, (9, -1))
    whole, after = model(patches)
    state, steps = None, []
    for i in range(9):
        predicted, state = model(patches[:, i : i + 1], state)
        steps.append(predicted)
        assert state.nbytes == state.expected_nbytes(i + 1)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-9, atol=1e-10)
    for key, value in after.tensors().items():
        torch.testing.assert_close(state.tensors()[key], value, rtol=1e-9, atol=1e-10)


@streaming
def test_a_later_patch_never_changes_an_earlier_output(name):
    model = randomised(name)
    patches = some_series(1, 8 * model.config.patch_length).unflatten(1, (8, -1))
    changed = patches.clone()
    changed[:, 5] += 1
    one, other = model(patches)[0], model(changed)[0]
    torch.testing.assert_close(one[:, :5], other[:, :5], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(one[:, 5], other[:, 5])
    # the scale of a window does know its end: without this the test above could not fail
    moved = model.pairs(changed.flatten(1), 8 * model.config.patch_length)[0]
    assert not torch.allclose(model.pairs(patches.flatten(1), 8 * model.config.patch_length)[0][:, :5], moved[:, :5])


@scaled
def test_a_series_without_any_value_is_refused(name):
    series = torch.cat([some_series(1, LENGTH), torch.full((1, LENGTH), math.nan, dtype=torch.float64)])
    with pytest.raises(ValueError, match="no observed value"):
        randomised(name).forecast(series, 5)


@every
def test_wrong_patches_are_refused(name):
    with pytest.raises(ValueError, match="patch"):
        randomised(name)(torch.zeros(1, 2, 999))
