"""GoldFinch as data: published sizes and cache ratios, and what is read off a file."""

import math

import pytest
import torch

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.errors import BadCheckpoint
from rookery.families.goldfinch import FAMILY, GoldFinchConfig, cache_report, create
from rookery.models import create_model, load
from rookery.registry import recognise


@pytest.mark.parametrize(
    ("layers", "width", "published"),
    [
        (24, 2048, 756.2),
        (80, 8192, 2550.0),
        (12, 768, 368.6),
        (32, 2560, 1011.4),
        (32, 4096, 1016.1),
        (40, 5120, 1272),
        (48, 6144, 1528),
        (60, 6656, 1910.8),
    ],
)
def test_a_token_takes_the_published_share_of_a_transformers_cache(layers, width, published):
    config = create(num_hidden_layers=layers, hidden_size=width)
    assert cache_report(config, 4096).marginal == pytest.approx(published, rel=2e-4)


def test_the_constant_part_counts_in_the_total():
    report = cache_report(FAMILY.presets["1.5b"], 4096)
    assert (report.tokens, report.transformer) == (4096, 805_306_368)
    assert report.goldfinch == 16 * (4 * 64 * 2048 + 2 * 2048 * 2) + 8 * 2 * 2048 * 2 + 4096 * 260
    assert report.total == pytest.approx(83.4, rel=1e-2)


def test_the_largest_model_has_the_published_number_of_parameters():
    count = sum(math.prod(shape) for shape in FAMILY.tensor_shapes(FAMILY.presets["1.5b"]).values())
    assert round(count / 1e9, 2) == 1.45


@pytest.mark.parametrize("preset", FAMILY.presets)
def test_every_size_is_read_off_the_tensors(preset):
    config = FAMILY.presets[preset]
    shapes = FAMILY.tensor_shapes(config)
    assert recognise(shapes) is FAMILY
    untold = {field: getattr(config, field) for field in FAMILY.not_in_shapes}
    assert FAMILY.config_from_shapes(shapes, **untold) == config


def test_other_shares_of_gold_layers_are_read_off_the_tensors():
    for gold in (1, 3, 4):
        config = create(hidden_size=64, num_hidden_layers=4, num_gold_layers=gold, vocab_size=32)
        assert FAMILY.config_from_shapes(FAMILY.tensor_shapes(config)) == config
        assert config.num_trunk_layers == 4 - gold


def test_published_files_load_without_the_bonus_that_they_carry(tmp_path):
    model = create_model("goldfinch-test")
    weights = model.state_dict() | {f"blocks.{i}.att.time_faaaa": torch.ones(2, 16) for i in range(2)}
    torch.save(weights, tmp_path / "released.pth")
    checkpoint = open_checkpoint(tmp_path / "released.pth")
    assert (checkpoint.family, checkpoint.config.head_dim) == (FAMILY, 16)
    back = load(tmp_path / "released.pth")
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(back(tokens)[0], model(tokens)[0])


def test_a_file_with_the_bonus_in_use_is_read_as_the_ablation():
    config = create(hidden_size=64, num_hidden_layers=3, has_second_value=False)
    shapes = FAMILY.tensor_shapes(config)
    assert "blocks.0.att.time_faaaa" in shapes
    assert FAMILY.config_from_shapes(shapes) == config


def test_damaged_files_are_refused_by_name():
    shapes = FAMILY.tensor_shapes(FAMILY.presets["test"])
    for name in ("blocks.3.att.query.weight", "blocks.2.att.query.weight"):
        with pytest.raises(
            BadCheckpoint, match=r"not a whole GoldFinch checkpoint: its last blocks have no att\.query"
        ):
            FAMILY.config_from_shapes({n: s for n, s in shapes.items() if n not in (name, "blocks.3.att.query.weight")})
    del shapes["blocks.0.att.time_decay_w1"]
    with pytest.raises(BadCheckpoint, match=r"GoldFinch checkpoint: 'blocks\.0\.att\.time_decay_w1' is missing"):
        FAMILY.config_from_shapes(shapes)


def test_more_gold_layers_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"num_gold_layers \(5\) must be 1 to num_hidden_layers \(4\)"):
        GoldFinchConfig(num_hidden_layers=4, num_gold_layers=5)
