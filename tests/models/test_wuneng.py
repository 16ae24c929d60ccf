"""WuNeng against the transformer and RWKV-7 that it is made of, and in all its variants (hybrids.md 4.6)."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from support.language import assert_close, assert_same_state, randomise, randomised, some_tokens

from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint
from rookery.families.wuneng import FAMILY, WuNengConfig
from rookery.models import create_model
from rookery.models.arwkv import TimeMix
from rookery.models.wuneng import expand_transformer, head_usage, read_twice
from rookery.nn.growth import growth
from rookery.nn.rwkv import Call
from rookery.recipes.tiny_test import tiny_test
from rookery.registry import configure, recognise
from rookery.reproduce.arms import parameters
from rookery.train.config import overlay
from rookery.train.loop import train

MIDDLES = ("gated", "additive", "concat", "none")
VARIANTS = [
    {"value_source": source, "state_read": read, "middle": middle, "state_window": window}
    for source, read, middle, window in itertools.product(("x", "attn"), ("single", "double"), MIDDLES, (1, 3))
]
BASES = [{"base": "transformer"}, {"base": "transformer", "out_mode": "sum", "attn_norm": False, "rope_theta": None}]
BASES += [{"iclr_scale": 2.0, "out_mode": "sum", "head_dim": 8}]


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS, *BASES], ids=lambda v: "-".join(map(str, v.values())))
def test_every_variant_is_the_same_in_pieces_and_packed(variant):
    model = randomised("wuneng-test", **{"num_hidden_layers": 1, **variant})
    tokens = some_tokens(model, 2, 13)
    whole, after = model(tokens)
    outputs, state = [], None
    for piece in tokens.split([1, 1, 5, 6], dim=1):
        logits, state = model(piece, state)
        outputs.append(logits)
        assert state.nbytes == state.expected_nbytes(int(state.tokens_seen.max()))
    assert_close(torch.cat(outputs, dim=1), whole, "logits")
    assert_same_state(state, after)
    packed, _ = model(tokens.reshape(1, -1), cu_seqlens=torch.tensor([0, 13, 26]))
    assert_close(packed.view_as(whole), whole, "packed")


@pytest.mark.parametrize("variant", [*VARIANTS[::5], *BASES], ids=lambda v: "-".join(map(str, v.values())))
def test_every_variant_is_read_off_its_tensors(variant):
    config = configure("wuneng-test", **variant)[1]
    shapes = FAMILY.tensor_shapes(config)
    assert recognise(shapes) is FAMILY
    read = FAMILY.config_from_shapes(shapes, **{name: getattr(config, name) for name in FAMILY.not_in_shapes})
    assert read == config
    model = create_model("wuneng-test", **variant)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert not [name for name, p in model.named_parameters() if not p.isfinite().all()]


@torch.no_grad()
@pytest.mark.parametrize("choices", [{}, {"state_window": 3}, {"out_mode": "concat", "value_source": "attn"}], ids=str)
def test_an_expanded_transformer_computes_what_it_did(choices):
    transformer = randomised("transformer-test")
    expanded = expand_transformer(transformer, **choices)
    tokens = some_tokens(transformer, 2, 20)
    assert expanded.config.num_heads == 4, "grouped keys are repeated"
    assert_close(expanded(tokens)[0], transformer(tokens)[0])
    assert not [name for name, p in expanded.named_parameters() if not p.isfinite().all()]


def test_a_transformer_with_other_heads_is_refused():
    with pytest.raises(ValueError, match="4 heads of 14 and a width of 32: WuNeng is made of causal transformers"):
        expand_transformer(create_model("transformer-test", head_dim=14))


@torch.no_grad()
def test_with_nothing_but_state_heads_a_block_is_the_time_mix_of_rwkv7_without_gate():
    model = randomised("wuneng-test", state_window=1, middle="none", num_hidden_layers=1)
    heads, config = model.blocks[0].att, model.config
    heads.fusion.output.weight[:, :32] = 0
    heads.state.alpha.fill_(1)
    sizes = {"decay_rank": 8, "rate_rank": 6, "hidden_size": 32, "head_dim": 16, "has_group_norm": True}
    mix = TimeMix(configure("arwkv-test", gate="none", **sizes)[1], 0).double()
    mix.group_norm_eps = config.group_norm_eps
    names = ("w0", "w1", "w2", "a0", "a1", "a2", "k_k", "k_a", "r_k")
    own = {name: heads.state.get_parameter(name) for name in names}
    own |= {f"x_{name}": heads.get_parameter(f"x_{name}") for name in "kvwa"} | {"x_r": heads.x_h}
    own |= {"receptance.weight": heads.state.query.weight, "key.weight": heads.key.weight}
    own |= {"value.weight": heads.value.weight, "output.weight": heads.fusion.output.weight[:, 32:]}
    own |= {f"ln_x.{part}": heads.state.ln_x.get_parameter(part) for part in ("weight", "bias")}
    mix.load_state_dict(own)
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got, state = heads(x, model.init_state(2).layers[0], call_of(model, x))
    want, shift, wkv, _ = mix(x, torch.zeros(2, 32).double(), torch.zeros(2, 2, 16, 16).double(), None, None)
    assert_close(got, want)
    assert_close(state.wkv, wkv)
    assert_close(state.att_shift, shift)


def call_of(model, x):
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    return Call(tokens, x, None, growth=growth(tokens, torch.zeros(2, dtype=torch.int64), 0, None))


@torch.no_grad()
@pytest.mark.parametrize(("bias", "kind"), [(1e3, 0), (-1e3, 1)])
def test_a_gate_wide_open_gives_one_kind_of_heads(bias, kind):
    fusion = randomised("wuneng-test").blocks[0].att.fusion
    fusion.middle.gate.bias.fill_(bias)
    given = torch.randn(2, 1, 5, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.equal(fusion.kinds(*given)[2], given[kind])


@torch.no_grad()
def test_reading_twice_is_the_state_transposed_times_what_it_gave():
    generator = torch.Generator().manual_seed(1)
    r, k, v, a, b = torch.randn(5, 1, 4, 2, 8, dtype=torch.float64, generator=generator)
    log_w = -torch.rand(1, 4, 2, 8, dtype=torch.float64, generator=generator)
    got, after = read_twice(r=r, state=torch.zeros(1, 2, 8, 8).double(), log_w=log_w, k=k, v=v, a=a, b=b)
    for head in range(2):
        state = torch.zeros(8, 8).double()
        for t in range(4):
            at = (0, t, head)
            state = state * log_w[at].exp() + torch.outer(state @ a[at], b[at]) + torch.outer(v[at], k[at])
            assert_close(got[at], state.T @ (state @ r[at]))
        assert_close(after[0, head], state)


@torch.no_grad()
def test_queries_that_forget_at_once_are_the_tokens_own():
    model = randomised("wuneng-test", state_window=3)
    plain = create_model("wuneng-test", dtype=torch.float64, state_window=1)
    weights = model.state_dict()
    for block in model.blocks:
        block.att.state.recency.copy_(torch.tensor([1e3, 0, 0]))
    plain.load_state_dict({name: x for name, x in weights.items() if "recency" not in name})
    tokens = some_tokens(model, 1, 12)
    assert torch.equal(model(tokens)[0], plain(tokens)[0])


@torch.no_grad()
def test_queries_are_averaged_over_the_tokens_that_are_there():
    model = randomised("wuneng-test", state_window=3, head_dim=32)
    heads = model.blocks[0].att.state
    heads.recency.copy_(torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64).log())
    x = torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, kept = heads.lately(x, model.init_state(2).layers[0].queries, call_of(model, x))
    assert_close(mean[:, 0], x[:, 0])
    assert_close(mean[:, 1], (0.3 * x[:, 1] + 0.2 * x[:, 0]) / 0.5)
    assert_close(mean[:, 3], 0.3 * x[:, 3] + 0.2 * x[:, 2] + 0.5 * x[:, 1])
    assert torch.equal(kept, x[:, 2:])


@pytest.mark.parametrize("middle", ["gated", "additive"])
def test_gradients_reach_every_part_after_one_step(middle):
    model = create_model("wuneng-test", middle=middle)
    tokens, optimizer = some_tokens(model, 2, 16), torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the zero output projection lets nothing through the first time
        optimizer.zero_grad()
        model(tokens)[0].log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
    names = ["alpha", "recency", "gate.weight" if middle == "gated" else "beta"]
    for name in names:
        found = [p for n, p in model.named_parameters() if n.endswith(name)]
        assert found
        assert all(p.grad.any() for p in found), name


def test_parameters_beyond_attention_are_those_of_the_formula():
    def of_heads(**choices):
        config = configure("wuneng", hidden_size=128, **choices)[1]
        total = parameters("wuneng", {"hidden_size": 128, "num_hidden_layers": 1, **choices})
        ffn_and_rest = 2 * 128 * config.vocab_size + 2 * 128 * config.intermediate_size
        return (total - ffn_and_rest) - 4 * 128**2, 2 * 2 * 128 * config.decay_rank

    for choices, squares in (({}, 3), ({"out_mode": "sum"}, 1), ({"middle": "none"}, 2)):
        more, low_rank = of_heads(**choices)
        vectors = more - squares * 128**2 - low_rank
        assert 0 < vectors < 80 * 128 + 128**2, choices  # the gate is [64, 128]


@torch.no_grad()
def test_shares_of_the_heads_are_reported():
    model = randomised("wuneng-test")
    shares = head_usage(model, some_tokens(model, 2, 9))
    assert len(shares) == 2
    assert [list(share) for share in shares] == [["attention", "state", "middle"]] * 2
    assert all(sum(share.values()) == pytest.approx(1) for share in shares)
    silent = expand_transformer(randomise(create_model("transformer-test", dtype=torch.float64)))
    assert head_usage(silent, some_tokens(silent, 1, 9))[0]["state"] == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"state_window": 0}, "state_window .0. must be at least 1, the token itself"),
        ({"head_dim": 3, "hidden_size": 9}, "head_dim .3. must be even for rotary embeddings"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        WuNengConfig(**wrong)


def test_a_missing_tensor_is_named():
    shapes = FAMILY.tensor_shapes(FAMILY.presets["test"])
    del shapes["blocks.0.att.state.w1"]
    with pytest.raises(BadCheckpoint, match=r"not a whole WuNeng checkpoint: 'blocks.0.att.state.w1' is missing"):
        FAMILY.config_from_shapes(shapes)


def test_it_learns_through_the_trainer_and_writes_texts(tmp_path):
    (tmp_path / "text.txt").write_text("the rook sees the rook. " * 200)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_window": 2}
    config = replace(tiny_test(), model="wuneng", overrides=sizes, steps=20, out=str(tmp_path / "run"), recompute=True)
    train(overlay(config, {"data": {"path": str(tmp_path / "text.txt")}}))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    llm = LLM(tmp_path / "run" / "model.safetensors", tokenizer="bytes")
    session = llm.session()
    session.feed("the rook ")
    fork = session.fork()
    assert "".join(fork.stream(12, 0.0)) == llm.generate("the rook ", max_tokens=12, temperature=0.0)
    assert (session.tokens_seen, fork.tokens_seen) == (9, 21)
