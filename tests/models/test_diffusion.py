"""What every diffusion model promises, over the registry, and the published sizes: it is true that …"""

import re

import pytest
import torch
from support.diffusion import condition, images, names, randomised, row
from support.files import assert_comes_back, assert_refused_by_name, assert_same_weights

import rookery
from rookery.checkpoints import open_checkpoint
from rookery.errors import BadCheckpoint
from rookery.families.diffusion import PRESETS
from rookery.models import create_model
from rookery.models.diffusion import patchify, sincos_positions, unpatchify
from rookery.registry import configure, families

every = pytest.mark.parametrize("name", names())
LEVELS = torch.tensor([3.0, 41.5])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# the contract of all diffusion models


@every
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (5, 11), (12, 6)], ids=str)
def test_images_of_any_size_come_back_in_their_size(name, size):
    model = randomised(name, dtype=torch.float32)
    out = model(images(*size).float(), LEVELS)
    assert out.shape == (2, model.config.out_channels, *size)
    assert out.isfinite().all()


@every
def test_every_parameter_gets_a_gradient(name):
    model = randomised(name)
    given = condition(model, 2)
    if hasattr(model, "text_embed"):
        given = model.words(["a red three", "two"])
    out = model(images(8, 6), LEVELS, given).square().sum() + model(images(8, 6), LEVELS).square().sum()
    out.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a model that no text reaches has no use for a null text but in what is pooled
    assert unused == []


@every
@torch.no_grad()
def test_an_image_alone_is_the_image_in_the_batch(name):
    model, batch = randomised(name), images(8, 6, batch=4)
    levels, given = torch.tensor([3.0, 41.5, 0.0, 49.0]), condition(model, 4)
    together = model(batch, levels, given)
    for i in range(4):
        close(model(batch[i : i + 1], levels[i : i + 1], row(given, i)), together[i : i + 1])
    assert model(batch[:0], levels[:0]).shape == (0, model.config.out_channels, 8, 6)


@every
@torch.no_grad()
def test_level_condition_and_image_all_matter(name):
    model, batch = randomised(name), images(8, 8)
    given = condition(model, 2)
    usual = model(batch, LEVELS, given)
    assert not torch.allclose(usual, model(batch, LEVELS + 5, given))
    assert not torch.allclose(usual, model(batch + 0.1, LEVELS, given))
    assert not torch.allclose(usual, model(batch, LEVELS), atol=1e-6)


@every
def test_a_fresh_model_predicts_zero_whatever_it_is_told(name):
    model = create_model(name)
    assert not model(images(8, 8).float(), LEVELS).any()


@every
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(name, tmp_path):
    model = randomised(name, dtype=torch.float32)
    back = assert_comes_back(model, tmp_path / "m.safetensors")
    assert torch.equal(back(images(8, 8).float(), LEVELS), model(images(8, 8).float(), LEVELS))
    assert open_checkpoint(tmp_path / "m.safetensors").family.kind == "diffusion"


@every
def test_weights_missing_or_of_another_size_are_refused_by_name(name, tmp_path):
    weights = create_model(name).state_dict()
    assert_refused_by_name(weights, tmp_path, unknown="extra", missing="time_embed.mlp.2.weight")
    torch.save(weights | {"norm_f.bias": torch.ones(5)}, tmp_path / "other.pth")
    with pytest.raises(BadCheckpoint, match=r"norm_f\.bias"):
        rookery.load(tmp_path / "other.pth")


@every
def test_the_family_lists_the_tensors_and_reads_sizes_off_them(name):
    model = create_model(name, device="meta")
    family, config = configure(name)
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert shapes == family.tensor_shapes(config)
    assert [other.name for other in families().values() if other.recognise(shapes)] == [family.name]
    found = family.config_from_shapes(shapes)
    hidden = ("noise_steps", "beta_last", "prediction", "align", "removal", "directions")  # tensors do not show these
    for field in (f for f in config.__dataclass_fields__ if f not in hidden):
        assert getattr(found, field) == getattr(config, field), field


@every
def test_the_same_seed_gives_the_same_weights_whatever_the_dtype(name):
    first, again, other = create_model(name, seed=3), create_model(name, seed=3), create_model(name, seed=4)
    assert_same_weights(again, first.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    narrow = create_model(name, seed=3, dtype=torch.bfloat16)
    assert_same_weights(narrow, {key: weight.bfloat16() for key, weight in first.state_dict().items()})
    assert narrow(images(8, 8).bfloat16(), LEVELS).dtype == torch.bfloat16


@every
@pytest.mark.parametrize(
    ("wrong", "levels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), LEVELS, "images must be [batch, 1, height, width] of at least one pixel, got [2, 3"),
        (torch.zeros(2, 8, 8), LEVELS, "images must be [batch, 1, height, width] of at least one pixel, got [2, 8, 8]"),
        (torch.zeros(2, 1, 0, 8), LEVELS, "images must be [batch, 1, height, width] of at least one pixel"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), LEVELS, "images must be floats from −1 to 1, got torch.uint8"),
        (torch.zeros(2, 1, 8, 8), LEVELS[:1], "level must be [batch] = [2], got [1]"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(name, wrong, levels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name)(wrong, levels)


# Diffusion-RWKV

PUBLISHED = {"small": 39.3, "base": 74.8, "medium": 132.6, "large": 439.4, "huge": 780.3}
"""Millions, for 4 channels and 1000 classes."""


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_right(size):
    model = create_model(f"diffusion-rwkv-{size}", device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == PUBLISHED[size]
    shapes = families()["diffusion-rwkv"].tensor_shapes(PRESETS[size])
    assert families()["diffusion-rwkv"].config_from_shapes(shapes) == PRESETS[size]


def test_labels_out_of_range_are_refused():
    model = create_model("diffusion-rwkv-test")
    for labels in (torch.tensor([0, 11]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=r"labels go from 0 to 9 \(10 for none\)"):
            model(images(8, 8).float(), LEVELS, labels)
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        model(images(8, 8).float(), LEVELS, torch.tensor([1.0, 2.0]))


@torch.no_grad()
def test_the_last_block_reads_what_the_first_wrote():
    model = randomised("diffusion-rwkv-test", num_hidden_layers=5)
    assert [block.skip_linear.weight.shape for block in model.out_blocks] == [(32, 64)] * 2
    before = model(images(8, 8), LEVELS)
    written = []
    model.in_blocks[0].register_forward_hook(lambda block, given, out: written.append(out[0]))
    read = []
    model.out_blocks[1].register_forward_pre_hook(lambda block, given: read.append(given[4]))
    close(model(images(8, 8), LEVELS), before)
    assert torch.equal(written[0], read[0])


def test_stochastic_depth_acts_in_training_only_and_more_in_later_blocks():
    model = randomised("diffusion-rwkv-test", drop_path=0.9)
    assert [b.drop_path for b in (model.in_blocks[0], model.mid_block, model.out_blocks[0])] == [0, 0.3, 0.6]
    once, again = (model(images(8, 8), LEVELS) for _ in range(2))
    assert torch.equal(once, again)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(images(8, 8, batch=2), LEVELS), once)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_hidden_layers": 4}, "must be odd"),
        ({"image_size": 7}, "must be a multiple of patch_size"),
        ({"beta_first": 0.5}, "0 < beta_first ≤ beta_last < 1"),
        ({"prediction": "flow"}, "a flow has no variance to learn"),
        ({"hidden_size": 30}, "must be a multiple of 4"),
        ({"variant": "v7", "head_dim": 24}, "must be a multiple of head_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        create_model("diffusion-rwkv-test", **given)


# pieces


def test_patches_go_back_to_where_they_came_from_in_grids_that_are_not_square():
    batch = images(6, 10, channels=3)
    tokens = patchify(batch, 2)
    assert tokens.shape == (2, 15, 12)
    assert torch.equal(tokens[0, 6, 4 * 0 + 3 : 6], batch[0, :, 2, 3])  # row 1, column 1: pixel (2, 3) comes second
    assert torch.equal(unpatchify(tokens, (3, 5), 2), batch)


def test_positions_tell_columns_from_rows():
    places = sincos_positions(16, (3, 4)).unflatten(0, (3, 4))
    assert torch.equal(places[0, :, :8], places[2, :, :8])
    assert torch.equal(places[:, 1, 8:], places[:, 3, 8:])
    assert places[0, 0].tolist() == ([0.0] * 4 + [1.0] * 4) * 2
    assert places.flatten(0, 1).unique(dim=0).shape == (12, 16)
