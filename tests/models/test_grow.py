"""Growth of Meta-State (state_methods.md 2.4, oracles 2.8.3 and 2.8.4): it is true that …"""

import pytest
import torch
from support.language import randomise, some_tokens
from torch.nn.functional import cross_entropy

from rookery.models import create_model, load, save_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 32, "intermediate_size": 48}
RANKS = {"decay_rank": 8, "rate_rank": 6, "value_rank": 4, "gate_rank": 10}
AXES = {
    "tokens": ({"tokens": 24}, 1e-14),
    "heads": ({"heads": 2}, 1e-12),
    "encoders": ({"encoders": 1}, 1e-14),
    "layers": ({"layers": [1, 3]}, 0.0),
    "all": ({"tokens": 8, "heads": 1, "encoders": 1, "layers": [2]}, 1e-12),
}
"""Axis -> what is grown, and the largest change of a logit in float64 (found: 0 to 3e-15)."""


def model_of(dtype=torch.float64, **more):
    return randomise(create_model("meta-state", **SMALL, **RANKS, **more).to(dtype))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("axis", AXES)
def test_growth_changes_nothing_that_is_computed(axis):
    by, precision = AXES[axis]
    model = model_of()
    tokens = some_tokens(model, 2, 25)
    before, count = model(tokens)[0], parameters(model)
    report = model.grow(**by)
    after = model(tokens)[0]
    assert (after - before).abs().max() <= precision
    assert (report.before, report.after) == (count, parameters(model))
    assert report.after > report.before
    assert model.config.growth


def test_as_many_parameters_are_added_as_the_formula_says():
    config = model_of().config
    width, layers, size = config.hidden_size, config.num_hidden_layers, config.head_dim
    report = model_of().grow(tokens=24)
    assert report.after - report.before == 2 * 24 * width * layers
    report = model_of().grow(heads=2)
    ranks = sum(RANKS.values())
    new = 2 * size
    assert report.after - report.before == layers * new * (4 * width + ranks + 8) - new * (RANKS["value_rank"] + 1)
    report = model_of().grow(encoders=1)
    assert report.after - report.before == layers * size


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def test_new_tokens_learn_from_values_of_zero_and_never_from_keys_of_zero():
    for zero_keys in (False, True):
        model = model_of()
        model.grow(tokens=16)
        mixes = [block.ffn for block in model.blocks]
        if zero_keys:
            with torch.no_grad():
                for mix in mixes:
                    mix.key.weight[48:] = 0
                    mix.value.weight[:, 48:] = torch.randn(32, 16, dtype=torch.float64) * 0.1
        optimizer, found = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, some_tokens(model, 2, 12)).backward()
            found.append(
                tuple(float(g.abs().max()) for g in (mixes[0].key.weight.grad[48:], mixes[0].value.weight.grad[:, 48:]))
            )
            optimizer.step()
        if zero_keys:
            assert found == [(0.0, 0.0)] * 3, "a dead start"
        else:
            assert found[0][0] == 0
            assert found[0][1] > 0
            assert found[1][0] > 0


def test_the_optimiser_goes_on_with_its_moments_and_the_loss_is_continuous():
    model = model_of(torch.float32)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    tokens = some_tokens(model, 4, 16)

    def step():
        loss = loss_of(model, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(8):
        step()
    name = "blocks.0.ffn.key.weight"
    moment = optimizer.state[model.get_parameter(name)]["exp_avg"].clone()
    last = loss_of(model, tokens).item()
    report = model.grow(tokens=16, heads=1, encoders=1, layers=[3], optimizer=optimizer)
    assert abs(loss_of(model, tokens).item() - last) < 1e-5
    carried = optimizer.state[model.get_parameter(name)]["exp_avg"]
    assert torch.equal(carried[:48], moment)
    assert not carried[48:].any()
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters()}
    assert name in report.changed
    assert "blocks.3.att.receptance.weight" in report.added
    for _ in range(6):
        step()
    assert losses[-1] < losses[7]
    assert max(after - before for before, after in zip(losses[7:], losses[8:])) < 0.05, "no jump at the growth"


def test_only_what_is_new_is_trained_where_the_old_is_frozen():
    model = model_of(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.grow(tokens=16, heads=1, layers=[3], freeze_old=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, some_tokens(model, 2, 12)).backward()
        optimizer.step()
    for name, old in before.items():
        now = model.get_parameter(name)
        assert torch.equal(now[tuple(slice(0, size) for size in old.shape)], old), name
    assert model.blocks[0].ffn.value.weight[:, 48:].any()
    assert model.blocks[3].ffn.value.weight.any()


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_what_is_old_moves_by_its_share(rate):
    models = [model_of(torch.float32) for _ in range(2)]
    steps = []
    for model, share in zip(models, (1.0, rate)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        model.grow(tokens=16, layers=[3], optimizer=optimizer, old_rate=share)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss_of(model, some_tokens(model, 2, 12)).backward()
        optimizer.step()
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    whole, share = steps
    torch.testing.assert_close(share["emb.weight"], rate * whole["emb.weight"], rtol=1e-3, atol=1e-6)
    name = "blocks.0.ffn.value.weight"
    torch.testing.assert_close(share[name][:, :48], rate * whole[name][:, :48], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(share[name][:, 48:], whole[name][:, 48:])
    assert torch.equal(share["blocks.3.att.output.weight"], whole["blocks.3.att.output.weight"])


def test_a_grown_model_is_saved_and_loaded(tmp_path):
    model = model_of(torch.float32)
    model.grow(heads=1, encoders=1)
    model.grow(tokens=8)
    save_model(model, tmp_path / "m.safetensors")
    back, tokens = load(tmp_path / "m.safetensors"), some_tokens(model, 1, 9)
    assert back.config.growth == ("1 heads+1 encoders", "8 tokens")
    assert back.config.encoder_heads == (1, 2)
    with torch.no_grad():
        assert torch.equal(back(tokens)[0], model(tokens)[0])
        state = model(tokens)[1]
    assert state.nbytes == state.expected_nbytes(9)


def test_what_cannot_grow_is_refused():
    with pytest.raises(ValueError, match="2 encoders cannot be added: 3 heads are not read yet"):
        model_of().grow(heads=2, encoders=2)
    with pytest.raises(ValueError, match="old_rate is kept by the optimiser"):
        model_of().grow(tokens=1, old_rate=0.3)
    with pytest.raises(ValueError, match="growth only adds"):
        model_of().grow(tokens=-1)
    with pytest.raises(ValueError, match=r"before blocks 1 to 3, got \[0\]; block 0 stays the first"):
        model_of().grow(layers=[0])
