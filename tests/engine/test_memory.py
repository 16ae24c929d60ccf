"""The formula of a model's bytes, against what RWKV-Lite publishes."""

import pytest

from rookery.checkpoints.lite import Head, LowRank, Manifest, Sparsity
from rookery.engine.memory import PARTS, formula, part_of
from rookery.registry import configure

WIDTH, LAYERS, VOCAB = 1024, 24, 65536


@pytest.fixture(scope="module")
def shapes():
    """The 0.4B model of RWKV-5.2, whose channel mix is 3.5 times as wide."""
    family, config = configure(
        "rwkv5", hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCAB, intermediate_size=3584
    )
    return family.tensor_shapes(config)


def manifest(**parts):
    return Manifest(**parts)


def test_a_plain_model_has_thirteen_squares_a_block(shapes):
    sizes = formula(shapes)
    assert set(sizes) == set(PARTS)
    assert sizes["time mix"] + sizes["channel mix"] == 13 * WIDTH**2 * LAYERS * 2
    assert sizes["embedding"] == sizes["head"] == VOCAB * WIDTH * 2


@pytest.mark.parametrize(("divisor", "squares"), [(8, 9.25), (4, 10.5)])
def test_low_rank_projections_leave_the_published_squares(shapes, divisor, squares):
    sizes = formula(shapes, manifest(low_rank=LowRank(divisor=divisor)))
    assert sizes["time mix"] + sizes["channel mix"] == squares * WIDTH**2 * LAYERS * 2


def test_all_together_is_the_published_range(shapes):
    told = manifest(
        low_rank=LowRank(divisor=8),
        sparsity=Sparsity(rank=64, bits=1, thresholds=[0.7] * LAYERS, quantiles=[0.8] * LAYERS),
        embedding_rows=1000,
        head=Head(clusters=200),
    )
    plain, small = formula(shapes), formula(shapes, told, units=0.2, rows=0.1)
    main = [part for part in PARTS if part != "the rest"]
    before, after = (sum(sizes[part] for part in main) for sizes in (plain, small))
    assert before == pytest.approx(923e6, rel=0.002)
    assert after == pytest.approx(225e6, rel=0.01)
    assert before / after == pytest.approx(4.1, abs=0.05)
    halved = formula(shapes, manifest(int8=True))
    assert halved["time mix"] * 2 == plain["time mix"]


def test_every_tensor_belongs_to_a_part():
    for name, part in {
        "emb.weight": "embedding",
        "head_l1.weight": "head",
        "head.sorted.weight": "head",
        "blocks.3.att.key1.weight": "time mix",
        "blocks.0.ffn.receptance2.weight": "channel mix",
        "blocks.0.mlp.fc1.weight": "channel mix",
        "blocks.0.ffn.neurons": "channel mix",
        "blocks.0.ffn.shadow_levels": "channel mix",
        "blocks.0.att.x_r": "the rest",
    }.items():
        assert part_of(name) == part
