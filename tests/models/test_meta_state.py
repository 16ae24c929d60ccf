"""Meta-State beyond the contract of all models (state_methods.md 2.8): it is true that …"""

from dataclasses import replace

import pytest
import torch
from support.language import randomised, some_tokens
from torch.nn.functional import cross_entropy

from rookery.adapt.state_tuning import StartState, load_start, save_start
from rookery.engine.llm import LLM
from rookery.errors import BackendUnavailable, BadCheckpoint
from rookery.families.meta_state import MetaStateConfig, config_from_shapes
from rookery.models import create_model, load, save_model
from rookery.models.meta_state import MetaState, head_norm

ALL_GROUPS = {"groups": 4, "active_groups": 4}


def model_of(dtype=torch.float64, **more):
    return randomised("meta-state-test", dtype=dtype, **more)


@torch.no_grad()
@pytest.mark.parametrize(
    "chosen", [{"sse_ratio": 1.0}, {"sse_ratio": 0.0}, {"evolve": "own"}, {"groups": 4, "active_groups": 4}]
)
def test_from_rwkv7_it_computes_what_rwkv7_computes(chosen):
    plain = randomised("rwkv7-test", dtype=torch.float32)
    model = MetaState.from_rwkv7(plain, **chosen)
    tokens = some_tokens(plain, 2, 30)
    logits, state = model(tokens)
    want, plain_state = plain(tokens)
    if chosen.get("evolve") == "own":  # token by token: other sums
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(logits, want)
        assert state.nbytes == plain_state.nbytes
    assert state.nbytes == state.expected_nbytes(30)


def test_one_more_vector_per_block_is_all_that_is_new():
    config = MetaStateConfig(hidden_size=256, num_hidden_layers=3, vocab_size=100)
    plain, meta = create_model("rwkv7-0.1b", device="meta"), create_model("meta-state-0.1b", device="meta")
    assert sum(p.numel() for p in meta.parameters()) - sum(p.numel() for p in plain.parameters()) == 4608
    assert config.encoder_heads == (2, 3)


@torch.no_grad()
def test_what_the_encoder_reads_is_the_state_times_the_query():
    model = model_of()
    mix, seen = model.blocks[1].ffn, []
    read = mix.read
    mix.read = lambda *given: seen.append((given, read(*given))) or seen[-1][1]
    model(some_tokens(model, 2, 40))
    (((x, signals, wkv, _), got),) = seen
    q, heads = mix.query(x), list(model.config.encoder_heads)
    state, want = wkv[:, heads], []
    for t in range(40):
        log_w, k, v, a, b = (part[:, t, heads] for part in (signals.log_w, signals.k, signals.v, signals.a, signals.b))
        state = (
            state * log_w.exp()[..., None, :]
            + (state @ a[..., None]) * b[..., None, :]
            + v[..., None] * k[..., None, :]
        )
        want.append((state @ q[:, t, ..., None])[..., 0])
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-12, atol=1e-12)


def test_the_encoders_strength_has_a_gradient_at_zero():
    model = MetaState.from_rwkv7(randomised("rwkv7-test"))
    model(some_tokens(model, 2, 12))[0].square().mean().backward()
    for block in model.blocks:
        assert (block.ffn.sse_eta.grad.abs() > 0).all()


@torch.no_grad()
def test_with_a_state_of_its_own_the_first_token_gets_the_plain_answer():
    plain = randomised("rwkv7-test")
    model = MetaState.from_rwkv7(plain, evolve="own")
    for block in model.blocks:
        block.ffn.sse_eta.fill_(0.7)
    tokens = some_tokens(plain, 3, 2)
    torch.testing.assert_close(model(tokens[:, :1])[0], plain(tokens[:, :1])[0], rtol=1e-12, atol=1e-12)
    assert (model(tokens)[0] - plain(tokens)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_state_of_its_own_carries_over_cuts_rows_and_documents():
    model = model_of(evolve="own")
    tokens = some_tokens(model, 2, 13)
    whole, after = model(tokens)
    one, state = model(tokens[:, :5])
    two, state = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.tensors(), after.tensors(), rtol=1e-9, atol=1e-10)
    packed, _ = model(tokens.reshape(1, -1), None, torch.tensor([0, 13, 26]))
    torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-9, atol=1e-10)
    assert after.nbytes == after.expected_nbytes(13)
    assert after.tensors()["layers.0.meta"].shape == (2, 1, 16, 16)


@torch.no_grad()
def test_all_groups_are_every_token_and_fewer_are_the_most_excited():
    model = model_of()
    ffn, u = model.blocks[0].ffn, torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = (u @ ffn.key.weight.T).relu().square()
    energies = hidden.unflatten(-1, (4, -1)).square().sum(-1)
    for active in (1, 4):
        ffn.config = replace(model.config, active_groups=active)
        kept = energies >= energies.sort(-1, descending=True).values[:, active - 1 : active]
        want = (hidden.unflatten(-1, (4, -1)) * kept[..., None]).flatten(-2) @ ffn.value.weight.T
        torch.testing.assert_close(ffn.answer(u), want)


@torch.no_grad()
def test_the_norm_has_mean_zero_and_variance_one():
    x = 3 + 5 * torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = head_norm(x, 64e-5)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(4, 3, dtype=torch.float64), rtol=1e-3, atol=0)


@torch.no_grad()
def test_padding_leaves_what_is_read_later_as_it_is():
    model = model_of()
    tokens = some_tokens(model, 1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], 1)
    mask = torch.tensor([[False] * 4 + [True] * 9])
    torch.testing.assert_close(model(padded, mask=mask)[0][:, 4:], model(tokens)[0], rtol=1e-9, atol=1e-10)


def test_the_engine_runs_it_with_torch_from_its_file(tmp_path):
    model = model_of(torch.float32).eval()
    save_model(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").config == model.config
    llm = LLM(tmp_path / "m.safetensors")
    assert llm.runner.name == "torch"
    session = llm.session()
    session.feed([3, 4, 5])
    tokens, want = torch.tensor([[3, 4, 5]]), []
    with torch.no_grad():
        for _ in range(5):
            want.append(int(model(tokens)[0][0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[want[-1]]])], 1)
    assert list(session.stream_tokens(5, temperature=0, ignore_eos=True)) == want
    with pytest.raises(BackendUnavailable, match="is a model of the family meta-state; run it with torch"):
        LLM(tmp_path / "m.safetensors", quantize="int8")


def test_its_start_state_is_tuned_like_any_other(tmp_path):
    model = model_of(torch.float32).requires_grad_(False).eval()
    start, tokens = StartState(model), some_tokens(model, 4, 8)
    optimizer, losses = torch.optim.Adam(start.parameters(), lr=0.1), []
    for _ in range(15):
        logits, _ = model(tokens[:, :-1], start(4))
        losses.append(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    save_start(start, tmp_path / "s.safetensors", model)
    save_model(model, tmp_path / "m.safetensors")
    torch.testing.assert_close(load_start(tmp_path / "s.safetensors", model).state_dict(), start.state_dict())
    session = LLM(tmp_path / "m.safetensors").session(state=tmp_path / "s.safetensors")
    session.feed([1, 2])
    assert session.tokens_seen == 2


def test_sizes_come_from_the_tensors_where_nothing_is_said():
    shapes = {n: tuple(p.shape) for n, p in create_model("meta-state", **SMALL).named_parameters()}
    assert config_from_shapes(shapes).encoder_heads == (2, 3)
    with pytest.raises(BadCheckpoint, match="which are no heads of 16 out of 4"):
        config_from_shapes({**shapes, "blocks.0.ffn.sse_eta": (24,)})


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 32}
WRONG = {
    "sse_ratio must lie in": {"sse_ratio": 1.5},
    r"encoder_heads must be different numbers from 0 to 3, got \[1, 1\]": {"encoder_heads": (1, 1)},
    "2 encoder heads need as many blocks of channels, got 1": {"encoder_heads": (1, 2), "encoder_blocks": (0,)},
    r"groups \(3\) must divide the 256 parameter tokens": {"groups": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_configs_that_make_no_sense_are_refused(message):
    with pytest.raises(ValueError, match=message):
        create_model("meta-state", **SMALL, **WRONG[message])


def test_only_rwkv7_can_be_made_into_it():
    with pytest.raises(ValueError, match="Meta-State is made from rwkv7 models, this one is rwkv6"):
        MetaState.from_rwkv7(create_model("rwkv6-test"))
