"""RWKV-X against its definition: which chunks are seen, what is evicted when, what a cache costs, how it begins."""

import logging

import pytest
import torch
from support.language import assert_close, assert_same_state, randomise, randomised, some_tokens
from torch.nn.functional import scaled_dot_product_attention

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint
from rookery.families import rwkv_x
from rookery.families.chunked import BUDGETS
from rookery.families.rwkv_x import FAMILY, RWKVXConfig
from rookery.models import create_model, load, save_model
from rookery.models.rwkv_x import RWKVX, SparseState, expand
from rookery.nn import chunk_cache
from rookery.ops.chunk_attention.choice import liked_chunks
from rookery.registry import configure

UNBOUNDED = {"max_entries": 0}


def sparse_layers(state):
    return [layer for layer in state.layers if isinstance(layer, SparseState)]


# what is seen


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 12])
def test_a_window_that_covers_everything_is_dense_causal_attention(length):
    model = randomised("rwkv-x-test", **UNBOUNDED)  # 3 chunks of 4
    block = model.moba[0]
    made = []
    block.att.register_forward_hook(lambda _, given, found: made.append((given[0], found[0])))
    model(some_tokens(model, 2, length))
    (x, y), att = made[0], block.att
    q, k, v = (att.heads(part(x)).transpose(1, 2) for part in (att.receptance, att.key, att.value))
    dense = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert_close(y, att.output(dense))


def naive(config, q, k, v):
    """One head of one row, token by token with lists: the algorithm as the specification words it."""
    held, recent, outputs, positions = [], [], [], []
    size = config.chunk_size
    for t in range(len(q)):
        held.append((t, k[t], v[t]))
        recent = [*recent, q[t]][-config.observed :]
        chunks = [held[i : i + size] for i in range(0, len(held), size)]
        own = (len(held) - 1) // size
        gate = [float(q[t] @ torch.stack([key for _, key, _ in chunk]).mean(0)) for chunk in chunks[:own]]
        best = sorted(range(own), key=lambda c: -gate[c])[: config.topk - 1]
        seen = [entry for c in [*best, own] for entry in chunks[c]]
        weights = (torch.stack([key for _, key, _ in seen]) @ q[t] / len(q[t]) ** 0.5).softmax(0)
        outputs.append(weights @ torch.stack([value for *_, value in seen]))
        if len(held) == config.max_entries:
            start = (config.max_entries - config.window) // size * size
            older, window = held[:start], held[start:]
            keep = config.min_entries - len(window)
            keys = torch.stack([key for _, key, _ in older])
            votes = sum((keys @ query / len(query) ** 0.5).softmax(0) for query in recent)
            if config.eviction == "newest":
                votes = torch.arange(len(older))
            best = sorted(range(len(older)), key=lambda i: -float(votes[i]))[:keep]
            held = [older[i] for i in sorted(best)] + window
        positions.append([position for position, *_ in held])
    return torch.stack(outputs), positions


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["vote", "newest"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_entries": 32, "min_entries": 24, "window": 8},
        {"max_entries": 30, "min_entries": 17, "window": 5, "observed": 4},  # no multiples of the chunk
        {"max_entries": 9, "min_entries": 8, "window": 1, "topk": 2},
    ],
)
def test_attention_and_eviction_are_those_of_a_token_by_token_account(limits, eviction):
    config = configure("rwkv-x-test", **{**limits, "eviction": eviction})[1]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 75, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    for cuts in ([75], [1] * 75, [33, 42], [7] * 10 + [5]):
        cache = chunk_cache.empty(config, 1, 2, 8, q)
        found, seen, held = [], torch.zeros(1, dtype=torch.int64), []
        for a, b, c in zip(*(x.split(cuts, dim=1) for x in (q, k, v))):
            plan = chunk_cache.plan(config, a[..., 0, 0], seen, cache, None)
            y, cache = chunk_cache.attend(config, a, b, c, cache, plan.rounds)
            found.append(y)
            seen = seen + a.shape[1]
            held.append(chunk_cache.positions(config, cache, int(seen)))
        for head in range(2):
            want, positions = naive(config, q[0, :, head], k[0, :, head], v[0, :, head])
            assert_close(torch.cat(found, dim=1)[0, :, head], want, f"head {head}, cuts {cuts[:3]}")
            for end, at in zip(torch.tensor(cuts).cumsum(0).tolist(), held):
                assert at[0, head].tolist() == positions[end - 1], f"entries after {end} tokens"


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 7, 3, 4, 5])
def test_any_cut_gives_the_same_numbers_without_eviction(piece):
    model = randomised("rwkv-x-test", **UNBOUNDED)  # chunks of 4
    tokens = some_tokens(model, 2, 41)
    whole, after = model(tokens)
    parts, state = [], None
    for some in tokens.split(piece, dim=1):
        logits, state = model(some, state)
        parts.append(logits)
    assert_close(torch.cat(parts, dim=1), whole)
    assert_same_state(state, after)


@torch.no_grad()
def test_padded_rows_evict_at_their_own_tokens():
    model = randomised("rwkv-x-test")
    lengths = (70, 33, 9)
    mask = torch.arange(70) < torch.tensor(lengths)[:, None]
    tokens, more = some_tokens(model, 3, 70), some_tokens(model, 3, 30, seed=8)
    padded, state = model(tokens, mask=mask)
    further, _ = model(more, state)
    for row, length in enumerate(lengths):
        alone, own = model(tokens[row : row + 1, :length])
        assert_close(padded[row : row + 1, :length], alone, f"row {row}")
        assert_close(further[row : row + 1], model(more[row : row + 1], own)[0], f"row {row}, further on")


def test_chunks_are_chosen_in_float32_and_the_later_one_among_equals():
    q = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)  # q · mean is beyond float16
    means = torch.tensor([290.0, 310.0, 300.0, 310.0])[None, :, None, None].expand(-1, -1, 1, 64)
    best, there = liked_chunks(q, means, torch.tensor([[4]]), 3)
    assert best.tolist() == [[[[3, 1, 2]]]]
    assert there.all()
    best, there = liked_chunks(q, means, torch.tensor([[1]]), 3)
    assert best[..., 0].item() == 0
    assert there.tolist() == [[[[True, False, False]]]]
    model = create_model("rwkv-x-test", dtype=torch.float16)
    assert model(some_tokens(model, 1, 9))[1].layers[1].chunk_means.dtype == torch.float32


# the cache


@torch.no_grad()
def test_the_cache_is_as_large_as_the_formula_says_after_every_token():
    for name, limits in (("bounded", {}), ("unbounded", UNBOUNDED), ("newest", {"eviction": "newest"})):
        model = create_model("rwkv-x-test", **limits)
        config, state, held = model.config, model.init_state(2), []
        for t in range(75):
            assert state.nbytes == state.expected_nbytes(t), f"{name} after {t} tokens"
            state = model(some_tokens(model, 2, 1), state)[1]
            held.append(config.entries(t + 1))
            if config.max_entries:
                for layer in sparse_layers(state):
                    at = chunk_cache.positions(config, chunk_cache.ChunkCache(*layer[:-1]), t + 1)
                    assert at.shape[-1] == held[-1]
                    assert (at.diff(dim=-1) > 0).all(), "in the order of their coming, none twice"
                    assert at[..., -8:].tolist() == [[list(range(max(0, t - 7), t + 1))] * 2] * 2
        if config.max_entries:
            assert max(held) == config.max_entries - 1
            assert {after for before, after in zip(held, held[1:]) if after < before} == {config.min_entries}
        else:
            assert held == list(range(1, 76))


def test_a_token_costs_what_the_paper_says():
    for size, parameters, fixed, token in (("0.2b", 28.3e6, 2.4e6, 12_288), ("3.6b", 629.2e6, 21.3e6, 81_920)):
        family, config = configure(f"rwkv-x-{size}", **UNBOUNDED)
        width, sparse = config.hidden_size, config.num_sparse_layers
        count = sum(torch.Size(shape).numel() for name, shape in family.tensor_shapes(config).items() if "moba" in name)
        assert count == sparse * (12 * width**2 + 5 * width)
        assert count == pytest.approx(parameters, rel=2e-3)
        sizes = [config.state_nbytes(tokens_seen=n * 2048, batch=1, itemsize=2) for n in (0, 10, 11)]
        assert sizes[0] == pytest.approx(fixed, rel=0.01)
        means = sparse * width * 4  # what choosing by stored means adds, for a chunk
        assert sizes[2] - sizes[1] == 2048 * token + means


@torch.no_grad()
def test_nothing_is_evicted_before_the_cache_is_full():
    bounded, unbounded = randomised("rwkv-x-test"), randomised("rwkv-x-test", **UNBOUNDED)
    tokens = some_tokens(bounded, 1, 60)
    a, b = bounded(tokens)[0], unbounded(tokens)[0]
    assert_close(a[:, :32], b[:, :32])  # the 32nd token sees all, then the cache is reduced
    assert not torch.allclose(a[:, 32:], b[:, 32:])


def test_entries_without_a_vote_keep_their_order():
    config = configure("rwkv-x-test")[1]
    keys = torch.randn(2, 32, 2, 16, generator=torch.Generator().manual_seed(1))
    kept = chunk_cache.kept(config, keys, torch.zeros(2, 3, 2, 16))
    assert kept.tolist() == [[[*range(16), *range(24, 32)]] * 2] * 2


@torch.no_grad()
def test_decoding_does_not_copy_complete_chunks():
    model = randomised("rwkv-x-test", dtype=torch.float32)
    state = model(some_tokens(model, 1, 21))[1]
    after = model(some_tokens(model, 1, 1), state)[1]
    for old, new in zip(sparse_layers(state), sparse_layers(after)):
        assert old.past_keys is new.past_keys
        assert old.past_values is new.past_values


# growing out of an RWKV-7


@torch.no_grad()
def test_a_model_without_sparse_blocks_is_rwkv7():
    model = randomised("rwkv-x-test", num_sparse_layers=0, dtype=torch.float32)
    tokens = some_tokens(model, 2, 20)
    assert torch.equal(model(tokens)[0], model.rwkv(tokens)[0])
    assert not sparse_layers(model.init_state(1))


@torch.no_grad()
@pytest.mark.parametrize("sparse", [1, 3])
def test_expansion_starts_as_the_identity(sparse):
    base = randomised("rwkv7-test", dtype=torch.float32)
    tokens = some_tokens(base, 2, 40)
    want = base(tokens)[0]
    small = {"num_sparse_layers": sparse, "chunk_size": 4, "topk": 2}
    model = expand(base, **small)
    assert torch.equal(model(tokens)[0], want)
    assert torch.equal(model.moba[0].att.key.weight, base.blocks[3 // sparse - 1].att.key.weight)
    copied = expand(base, init="copy", **small)
    assert torch.equal(copied.moba[-1].ffn.value.weight, base.blocks[2].ffn.value.weight)
    assert not torch.allclose(copied(tokens)[0], want)
    fresh = RWKVX(copied.config)
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(fresh(tokens)[0], copied(tokens)[0])


def test_what_cannot_be_expanded_is_refused():
    with pytest.raises(ValueError, match="between those of an RWKV-7, not of rwkv6"):
        expand(create_model("rwkv6-test"))
    with pytest.raises(ValueError, match="init must be zero or copy, got 'one'"):
        expand(create_model("rwkv7-test"), init="one")


# sizes and files


def test_blocks_stand_where_the_published_model_has_them():
    def order(layers, sparse, **more):
        names = RWKVXConfig(num_hidden_layers=layers, num_sparse_layers=sparse, **more).order
        return " ".join(name.replace("rwkv.blocks.", "").replace("moba.", "m") for name in names)

    assert order(4, 2) == "0 1 m0 2 3 m1"
    assert order(4, 1) == "0 1 2 3 m0"
    assert order(3, 0) == "0 1 2"
    assert order(5, 2, remainder="append") == "0 1 m0 2 3 m1 4"
    assert order(5, 2, remainder="drop") == "0 1 m0 2 3 m1"
    assert order(1, 2, remainder="append") == "m0 m1 0"
    assert configure("rwkv-x", num_hidden_layers=12)[1].num_sparse_layers == 4
    assert configure("rwkv-x", num_hidden_layers=32)[1].num_sparse_layers == 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_hidden_layers": 13, "remainder": "refuse"}, "13 RWKV-7 blocks cannot be shared equally among 2 sparse"),
        ({"remainder": "lose"}, "remainder must be refuse, append or drop"),
        ({"num_sparse_layers": -1}, "num_sparse_layers must be 0 or more"),
        ({"chunk_size": 0}, r"chunk_size \(0\) and topk \(3\) must be at least 1"),
        ({"eviction": "fifo"}, "eviction must be vote or newest, got 'fifo'"),
        ({"min_entries": 32}, r"min_entries \(32\) must be smaller than max_entries \(32\)"),
        ({"min_entries": 10, "window": 11}, "hold the window, which is 12 entries in whole chunks of 4"),
        ({"observed": 0}, "observed"),
    ],
)
def test_sizes_that_make_no_model_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        configure("rwkv-x-test", **wrong)


def test_published_budgets_are_sizes_of_the_published_models():
    for budget in BUDGETS.values():
        configure("rwkv-x-3.6b", **budget)
    pip = configure("rwkv-x-3.6b", **BUDGETS["pip-default"])[1]
    assert [pip.entries(n) for n in (19_999, 20_000, 23_999, 24_000)] == [19_999, 16_000, 19_999, 16_000]


def test_a_published_file_is_recognised_and_its_open_sizes_are_told(tmp_path, caplog):
    model = randomise(create_model("rwkv-x-test", remainder="refuse", num_hidden_layers=4, seed=3))
    weights = model.state_dict() | {f"rwkv.blocks.0.att.v{i}": torch.zeros(1, 1, 32) for i in "012"}
    torch.save(weights, tmp_path / "RWKV-X.pth")
    with caplog.at_level(logging.WARNING, "rookery"):
        found = open_checkpoint(tmp_path / "RWKV-X.pth")
    assert "do not say chunk_size and topk: taken are 2048 and 3" in caplog.text
    assert found.family is FAMILY
    assert (found.config.num_hidden_layers, found.config.num_sparse_layers, found.config.head_dim) == (4, 2, 16)
    assert set(found.unused) == {f"rwkv.blocks.0.att.v{i}" for i in "012"}
    told = {name: getattr(model.config, name) for name in rwkv_x.OWN}
    tokens = some_tokens(model, 1, 60)
    want = model(tokens)[0]
    caplog.clear()
    assert torch.equal(load(tmp_path / "RWKV-X.pth", settings=told)(tokens)[0], want)
    assert not caplog.text
    assert not torch.allclose(load(tmp_path / "RWKV-X.pth")(tokens)[0], want)
    # a converted file says them
    torch.save(weights, tmp_path / "again.pth")
    save_model(load(tmp_path / "again.pth", settings=told), tmp_path / "own.safetensors")
    caplog.clear()
    convert(tmp_path / "own.safetensors", tmp_path / "back.pth")
    assert torch.equal(load(tmp_path / "back.pth")(tokens)[0], want)
    assert not caplog.text


def test_a_file_with_blocks_that_would_never_run_is_refused_unless_told(tmp_path):
    model = create_model("rwkv-x-test", num_hidden_layers=5, remainder="drop")
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(BadCheckpoint, match='5 RWKV-7 blocks cannot be shared.*remainder="append"'):
        open_checkpoint(tmp_path / "odd.pth")
    assert open_checkpoint(tmp_path / "odd.pth", settings={"remainder": "drop"}).config.order[-1] == "moba.1"
    del (weights := model.state_dict())["moba.0.ln1.weight"]
    torch.save({k: v for k, v in weights.items() if not k.startswith("moba.0")}, tmp_path / "gap.pth")
    with pytest.raises(BadCheckpoint, match=r"its sparse blocks are numbered \['1'\]"):
        open_checkpoint(tmp_path / "gap.pth")


def test_a_session_beyond_the_cache_goes_on_from_a_fork_and_from_a_file(tmp_path):
    save_model(randomised("rwkv-x-test", vocab_size=256, dtype=torch.float32), tmp_path / "x.safetensors")
    llm = LLM(tmp_path / "x.safetensors")
    story = llm.session()
    story.feed(bytes(range(40, 90)).decode())
    story.save(tmp_path / "story.state")
    branch, back = story.fork(), llm.session(tmp_path / "story.state")
    told = [list(s.stream(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True)) for s in (story, branch, back)]
    assert told[0] == told[1] == told[2]
    assert story.tokens_seen == 62
    prompts = ["a" * 40, "bc" * 9, "d"]  # rows of unequal length, decoded together
    settings = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
    assert llm.generate(prompts, **settings) == [llm.generate(prompt, **settings) for prompt in prompts]
