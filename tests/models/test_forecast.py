"""The forecasters' published sizes, files and traps (timeseries.md 3, 8)."""

import pytest
import torch
from support.series import randomised, some_series

from rookery.adapt.config import AdaptConfig
from rookery.adapt.peft import attach
from rookery.adapt.quantised import quantise_base
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.errors import BadCheckpoint
from rookery.families import rimer_released, timer
from rookery.models import build, create_model, load
from rookery.models.forecast import in_order, sinusoid
from rookery.registry import configure
from rookery.train.tasks.forecast import forecast_loss, score

COUNTS = {
    "rimer-released": 1_614_880,
    "timer-67m": 67_397_728,
    "timer-38m": 37_862_432,
    "timer-8m": 8_598_624,
}
"""Parameters as published, or as the published shapes give them (timeseries.md 2.4)."""


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_their_number_of_parameters(name):
    family, config = configure(name)
    with torch.device("meta"):
        model = build(family, config)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


# one token


def gradients(patches):
    model = randomised("rimer-released-test")
    predicted, _ = model(some_series(2, patches * 4).unflatten(1, (patches, 4)))
    predicted[:, -1].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_over_one_token_the_decay_and_the_removal_key_learn_nothing():
    one, two = gradients(1), gradients(2)
    for name in ("att.w0", "att.w1", "att.w2", "att.x_w", "att.k_k"):
        assert one[name].abs().max() < 1e-15, name  # zero, up to rounding
        assert two[name].abs().max() > 1e-6, name


# published files


def published(model, prefixes):
    """A state dict of `model` under the released names, with either or both of their spellings."""
    weights = model.state_dict()
    mixer = {f"{n}_lora.lora.{i}.weight": weights[f"att.{n}{j}"].T for n in "wag" for i, j in ((0, 1), (2, 2))}
    mixer |= {f"{n}_lora.lora.2.bias": weights[f"att.{n}0"].flatten() for n in "wa"}
    mixer |= {"x_x": torch.cat([weights[f"att.x_{n}"] for n in "rwkvag"]).flatten(1), "r_k": weights["att.r_k"]}
    mixer |= {n: weights[f"att.{n}"].flatten() for n in ("k_k", "k_a")}
    mixer |= {f"{n[0]}_proj.weight": weights[f"att.{n}.weight"] for n in ("receptance", "key", "value", "output")}
    mixer |= {f"g_norm.{part}": weights[f"att.ln_x.{part}"] for part in ("weight", "bias")}
    rest = {
        f"{theirs}.{part}": weights[f"{ours}.{part}"]
        for theirs, ours in rimer_released.NAMES.items()
        for part in ("weight", "bias")
        if f"{ours}.{part}" in weights
    }
    whole = rest | {f"decoder.attn.rwkv7.{name}": value for name, value in mixer.items()}
    whole["patch_embedding.position_embedding.pe"] = torch.zeros(1, 50, model.config.hidden_size)
    found = {}
    if "backbone" in prefixes:
        found |= {f"backbone.{name}": value.clone() for name, value in whole.items()}
    if "alias" in prefixes:
        renamed = {name.replace("patch_embedding", "enc_embedding"): value for name, value in whole.items()}
        found |= {name: value.clone() for name, value in renamed.items()}
    return found


@pytest.mark.parametrize("prefixes", [("backbone",), ("alias",), ("backbone", "alias")], ids="+".join)
def test_a_released_file_loads_under_either_spelling(prefixes, tmp_path):
    model = randomised("rimer-released-test", dtype=torch.float32)
    torch.save(published(model, prefixes), tmp_path / "model.pth")
    assert open_checkpoint(tmp_path / "model.pth").family.name == "rimer-released"
    again, series = load(tmp_path / "model.pth").eval(), some_series(2, 8)
    assert torch.equal(again.forecast(series, 5), model.forecast(series, 5))


def test_two_spellings_that_disagree_are_refused(tmp_path):
    tensors = published(randomised("rimer-released-test", dtype=torch.float32), ("backbone", "alias"))
    tensors["decoder.mlp.value.bias"] += 1
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(BadCheckpoint, match="mlp.bias is stored twice"):
        load(tmp_path / "model.pth")


def test_a_timer_file_loads(tmp_path):
    model = randomised("timer-test", dtype=torch.float32, levels=(), num_attention_heads=8)
    tensors = {}
    for rule in timer.PUBLISHED.rules:
        for layer in range(2):
            name = rule.official.replace("{layer}", str(layer))
            if name in model.state_dict():
                value = model.state_dict()[name]
                tensors[rule.foreign.replace("{layer}", str(layer))] = value[..., None] if rule.steps else value
    tensors["backbone.patch_embedding.position_embedding.pe"] = torch.zeros(1, 50, 32)
    torch.save(tensors, tmp_path / "model.pth")
    again, series = load(tmp_path / "model.pth").eval(), some_series(2, 28)
    torch.testing.assert_close(again.forecast(series, 8), model.forecast(series, 8))


# pieces


def test_levels_are_met_by_steps_away_from_the_median():
    raw = torch.tensor([[5.0, -3.0, 1.0, 0.0, -2.0]])
    found = in_order(raw, (0.1, 0.3, 0.5, 0.7, 0.9))[0]
    assert found[2] == 1
    assert found.diff().min() > 0


def test_positions_are_sines_and_cosines():
    found = sinusoid(torch.tensor([3]), 2, 4)[0]
    angle = torch.tensor([[3.0, 0.03], [4.0, 0.04]])
    torch.testing.assert_close(found, torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1))


def test_window_and_stream_agree_while_the_window_only_grows():
    # timeseries.md 7.2: equal once both keep one scale and see the same points
    model = randomised("rimer-test", context_length=10**6, output_patches=1)
    model.scale = lambda history: type(model).scale(model, some_series(1, 40))
    series = some_series(1, 40)
    torch.testing.assert_close(model.forecast(series, 20, "window"), model.forecast(series, 20), rtol=1e-9, atol=1e-9)


def test_pinball_at_the_median_is_half_the_absolute_error():
    predicted, actual = some_series(3, 7)[..., None], some_series(3, 7, seed=9)
    torch.testing.assert_close(
        score(predicted, actual, (0.5,), "pinball"), (predicted[..., 0] - actual).abs().mean() / 2
    )


@pytest.mark.parametrize("kind", ["mse", "mae", "huber", "pinball"])
def test_missing_targets_have_no_influence(kind):
    model, windows = randomised("rimer-test"), some_series(2, 44)
    some = windows.clone()
    some[1, 36:] = torch.nan
    predicted, actual = model.pairs(some, 32)
    seen = ~actual.isnan()
    loss = forecast_loss(model, some, 32, kind)
    torch.testing.assert_close(loss, score(predicted[seen][None], actual[seen][None], model.config.levels, kind))
    assert loss.isfinite()
    assert loss != forecast_loss(model, windows, 32, kind)


def test_pinball_without_levels_is_refused():
    with pytest.raises(ValueError, match="quantile levels"):
        forecast_loss(create_model("rimer-test", levels=()), some_series(1, 40).float(), 32, "pinball")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"levels": (0.9, 0.5)}, "levels must rise"),
        ({"levels": (0.1, 0.9)}, "contain 0.5"),
        ({"levels": (0.0, 0.5)}, "between 0 and 1"),
        ({"patch_length": 0}, "patch_length must be at least 1"),
        ({"head_dim": 7}, "multiple of head_dim"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        create_model("rimer-test", **change)


def test_adapters_and_a_base_in_eight_bits_apply_to_a_forecaster():
    pytest.importorskip("peft")
    model, series = randomised("rimer-test", dtype=torch.float32), some_series(2, 40).float()
    want = model.forecast(series, 8)
    attach(model, AdaptConfig(rank=2))
    torch.testing.assert_close(model.forecast(series, 8), want)  # a fresh adapter adds nothing
    quantise_base(model, "int8")
    changed = (model.forecast(series, 8) - want).abs().max()
    assert 0 < changed < 0.05 * want.std()
    forecast_loss(model, series, 32).backward()
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert learned
    assert all(".lora_" in name for name in learned)


def test_eight_windows_can_be_learned_by_heart():
    wave = torch.sin(torch.arange(400) / 3).repeat(8, 1) + 0.5 * torch.randn(
        8, 400, generator=torch.Generator().manual_seed(0)
    )
    windows = wave[:, :40]
    model = create_model("rimer-test", levels=())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = forecast_loss(model, windows, 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted, actual = model.pairs(windows, 32)
    assert (predicted[:, -1, :, 0] - actual[:, -1]).square().mean() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_every_backend_of_the_recurrence_gives_the_same_forecast(backend, monkeypatch):
    from rookery.models import rwkv7
    from rookery.ops.wkv7 import wkv7

    model, series = randomised("rimer-test", dtype=torch.float32), some_series(2, 60)
    want = model.forecast(series, 24)
    calls = []

    def chosen(**given):
        calls.append(backend)
        return wkv7(**given, backend=backend)

    monkeypatch.setattr(rwkv7.TimeMix, "recurrence", staticmethod(chosen))
    torch.testing.assert_close(model.forecast(series, 24), want, rtol=1e-4, atol=1e-4)
    assert calls
