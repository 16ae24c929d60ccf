"""Temporal perspectives: identity at the start, what breaks the symmetry, and that the rest is the base's own."""

import pytest
import torch
from support.language import assert_close, randomise, randomised, some_tokens

from rookery.errors import UnknownName
from rookery.families.temporal_perspectives import BASES, is_mix
from rookery.models import create_model, load, save_model
from rookery.models.temporal_perspectives import TemporalPerspectives
from rookery.registry import list_models

BASE = pytest.mark.parametrize("base", BASES)


def converted(base="rwkv4", n=4, **settings):
    plain = randomised(f"{base}-test")
    return plain, TemporalPerspectives.from_base(plain, n, **settings)


@torch.no_grad()
@BASE
def test_a_converted_model_gives_the_logits_of_its_base(base):
    for n in (1, 2, 4):
        plain, model = converted(base, n)
        tokens = some_tokens(plain, 2, 30)
        want, got = plain(tokens)[0], model(tokens)[0]
        assert (want - got).abs().max() <= 1e-12
        if n == 1:
            assert torch.equal(want, got)
            assert torch.equal(model.perspective_weights(tokens), torch.ones(2, 30, 1, dtype=torch.float64))


@torch.no_grad()
@BASE
def test_a_collapsed_perspective_is_a_model_of_the_base(base):
    plain, model = converted(base)
    tokens = some_tokens(plain, 1, 20)
    assert torch.equal(model.collapse(2)(tokens)[0], plain(tokens)[0])
    randomise(model)
    z, weights, _ = model.perspectives(tokens)
    heads = torch.stack([model.collapse(i)(tokens)[0] for i in range(4)])
    assert_close(model.head(z), heads, "each perspective is a base of its own")
    assert_close(model(tokens)[0], torch.einsum("btn,nbtv->btv", weights, heads), "one head for all, or one for each")


@torch.no_grad()
@pytest.mark.parametrize("name", list_models("temporal-perspectives-*test"))
def test_step_by_step_and_packed_equal_the_whole(name):
    model = randomised(name)
    tokens = some_tokens(model, 1, 20)
    whole, after = model(tokens)
    assert after.nbytes == after.expected_nbytes(20) == model.config.perspectives * _base_bytes(model)
    state, logits = None, []
    for t in range(20):
        one, state = model(tokens[:, t : t + 1], state)
        logits.append(one)
    assert_close(torch.cat(logits, dim=1), whole)
    packed, _ = model(tokens, cu_seqlens=torch.tensor([0, 8, 20]))
    assert_close(packed[:, 8:], model(tokens[:, 8:])[0])


def _base_bytes(model):
    return model.config.base_config.state_nbytes(tokens_seen=20, batch=1, itemsize=8)


def test_at_the_start_only_the_mixing_vectors_have_gradients_and_these_add_up_to_the_bases():
    plain, model = converted()
    tokens = some_tokens(plain, 2, 30)
    targets = some_tokens(plain, 2, 30, seed=9)
    for each in (plain, model):
        torch.nn.functional.cross_entropy(each(tokens)[0].mT, targets).backward()
    shared = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if name == "convert3.weight":
            assert parameter.grad.abs().max() <= 1e-12
        elif is_mix(name):
            assert all(grad.any() for grad in parameter.grad)
            assert_close(parameter.grad.sum(0), shared[name], name)
        else:
            assert_close(parameter.grad, shared[name], name)


def _trained(model, steps, lr=1e-2):
    model.freeze("mixes", "convert")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        tokens = some_tokens(model, 4, 17, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].mT, tokens[:, 1:]).backward()
        optimizer.step()
    return model


def test_perspectives_of_equal_weight_stay_equal_and_others_part():
    _, model = converted(n=3)
    assert max(model.divergence()) == 0
    with torch.no_grad():
        model.convert3.weight.zero_()
    stuck = _trained(model, 6)
    mixes = [p for name, p in stuck.named_parameters() if is_mix(name)]
    assert all(torch.equal(p[0], p[i]) for p in mixes for i in range(1, 3))
    assert max(stuck.divergence()) == 0
    parted = _trained(converted(n=3)[1], 6)
    assert min(parted.divergence()) > 0


def test_training_perspectives_moves_nothing_else():
    _, model = converted(n=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    _trained(model, 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if is_mix(name) or name == "convert3.weight"}


@torch.no_grad()
def test_perspectives_have_no_order():
    model = randomised("temporal-perspectives-test")
    tokens, order = some_tokens(model, 1, 20), torch.tensor([2, 0, 1])
    want = model(tokens)[0]
    for name, parameter in model.named_parameters():
        if is_mix(name) or name == "convert3.weight":
            parameter.copy_(parameter[order].clone())
    assert_close(model(tokens)[0], want)


@torch.no_grad()
def test_noise_gives_up_the_equality_and_parts_them_at_once():
    plain, model = converted(mix_noise=0.01)
    assert min(model.divergence()) > 0
    tokens = some_tokens(plain, 1, 9)
    assert 0 < (model(tokens)[0] - plain(tokens)[0]).abs().max() < 1


@BASE
def test_a_saved_model_comes_back_and_so_does_one_without_a_config(base, tmp_path):
    _, model = converted(base, 3)
    model.float()
    save_model(model, tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    tokens = some_tokens(model, 1, 9)
    for file in ("m.safetensors", "m.pth"):
        back = load(tmp_path / file)
        assert (back.config.base, back.config.perspectives) == (base, 3)
        assert torch.equal(back(tokens)[0], model(tokens)[0])


@torch.no_grad()
def test_a_fresh_model_is_a_fresh_base():
    model, plain = create_model("temporal-perspectives-test", seed=4), create_model("rwkv4-test", seed=4)
    tokens = some_tokens(plain, 1, 9)
    torch.testing.assert_close(model(tokens)[0], plain(tokens)[0])


def test_the_head_can_be_trained_too_as_the_published_code_does():
    _, model = converted()
    names = model.freeze("mixes", "convert", "head")
    assert {"head.weight", "convert3.weight"} <= set(names)
    assert len(names) == 2 + 5 * model.config.num_hidden_layers


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="convert_std must be above 0: perspectives of equal weight never become"):
        converted(convert_std=0.0)
    with pytest.raises(UnknownName, match=r"no base for temporal perspectives named 'transformer'"):
        TemporalPerspectives.from_base(create_model("transformer-test"))
    with pytest.raises(ValueError, match="there is no part 'heads'; parts are mixes, convert, head"):
        converted()[1].freeze("heads")
    with pytest.raises(ValueError, match="perspectives must be at least 1, got 0"):
        create_model("temporal-perspectives-test", perspectives=0)
