"""Stages and LongCE: it is true that …"""

import json

import pytest
import torch

from rookery.models import create_model, load, save_model
from rookery.recipes import recipe
from rookery.train.config import DataConfig, FinetuneConfig, LongCEConfig, TrainConfig, overlay
from rookery.train.long_context import longce_loss, longce_weights, token_losses
from rookery.train.loop import train
from rookery.train.tasks.language import language_loss

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 256}
SPARSE = {"num_sparse_layers": 2, "chunk_size": 8, "topk": 2}


def settings(tmp_path, **changes):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay by the fog. " * 60)
    own = {
        "model": "rwkv-x",
        "data": {"path": str(text), "sequence_length": 48},
        "steps": 10,
        "batch_size": 2,
        "optim": {"lr": 1e-3, "final_lr": 1e-3},
        "out": str(tmp_path / "out"),
    }
    return overlay(recipe("tiny-test"), {**own, "overrides": {}, **changes})


@pytest.fixture
def base(tmp_path):
    model = create_model("rwkv7", **BASE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_model(model, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_alignment_moves_the_sparse_blocks_and_not_one_bit_of_the_rest(tmp_path, base):
    config = settings(tmp_path, initial=str(base), train_only="moba.*", recompute=True)
    object.__setattr__(config, "overrides", SPARSE)
    train(config)
    before, after = load(base), load(tmp_path / "out" / "model.safetensors")
    assert after.config.chunk_size == 8
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[f"rwkv.{name}"], weight), name
    assert all(block.att.output.weight.any() and block.ffn.value.weight.any() for block in after.moba)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_long_stage_goes_on_from_the_aligned_model_with_longce(tmp_path):
    save_model(create_model("rwkv-x", **BASE, **SPARSE), tmp_path / "aligned.safetensors")
    config = settings(tmp_path, initial=str(tmp_path / "aligned.safetensors"), longce={"truncation": 12}, steps=2)
    result = train(config)
    assert result.step == 2
    moved = load(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(moved.rwkv.emb.weight, load(tmp_path / "aligned.safetensors").rwkv.emb.weight)


@pytest.mark.parametrize(("stride", "floor", "normalise"), [(0, 0.0, False), (4, 1.0, False), (0, 0.0, True)])
def test_longce_is_that_of_its_definition(stride, floor, normalise):
    model = create_model("rwkv7-test").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    rows = torch.randint(1, 60, (2, 42), generator=torch.Generator().manual_seed(3))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    how = LongCEConfig(truncation=10, stride=stride, cap=1.5, floor=floor, normalise=normalise)

    def losses(tokens, wanted):
        logits, _ = model(tokens)
        return torch.nn.functional.cross_entropy(logits.mT.float(), wanted, reduction="none")

    with torch.no_grad():
        full, want = losses(inputs, targets), torch.ones(2, 41)
        step = stride or 10
        for t in range(20, 41):
            start = min(10 + (t - 20) // step * step, max(range(10, 31, step)))
            short = losses(inputs[:, start : t + 1], targets[:, start : t + 1])[:, -1]
            want[:, t] = (short - full[:, t]).exp().clamp(floor, 1.5)
        if normalise:
            want = want / want.mean()
    weights = longce_weights(model, inputs, targets, full, how)
    torch.testing.assert_close(weights, want, rtol=1e-4, atol=1e-5)
    assert not weights.requires_grad
    torch.testing.assert_close(longce_loss(model, inputs, targets, how), (want * full).mean(), rtol=1e-4, atol=1e-5)


def test_a_row_too_short_for_longce_has_the_plain_loss_and_gradient():
    model = create_model("rwkv7-test").double()
    rows = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    found = []
    for loss in (
        longce_loss(model, inputs, targets, LongCEConfig(truncation=10), 1e-2),
        language_loss(model, inputs, targets, 1e-2),
    ):
        found.append((loss.detach(), *torch.autograd.grad(loss, [model.head.weight, model.emb.weight])))
    for one, other in zip(*found):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-8)


def test_losses_of_few_tokens_at_a_time_are_those_of_all():
    features, weight = torch.randn(2, 9, 4), torch.randn(7, 4)
    targets = torch.randint(7, (2, 9))
    torch.testing.assert_close(
        token_losses(features, weight, targets, 0.1, at_once=5)[0], token_losses(features, weight, targets, 0.1)[0]
    )


def test_runs_that_make_no_sense_are_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r"train_only='mob.\*' names no parameter of rwkv7"):
        train(settings(tmp_path, model="rwkv7-test", initial=str(base), train_only="mob.*"))
    with pytest.raises(ValueError, match="leaves the rest as it is: give initial, a trained model"):
        train(settings(tmp_path, model="rwkv7-test", train_only="blocks.*"))
    with pytest.raises(ValueError, match="longce weighs tokens of whole rows"):
        TrainConfig(longce=LongCEConfig(truncation=4), piece_length=8)
    with pytest.raises(ValueError, match="longce weighs tokens of windows"):
        TrainConfig(longce=LongCEConfig(truncation=4), data=DataConfig(order="documents"))
    with pytest.raises(ValueError, match='adapt.method must be "full"'):
        FinetuneConfig(train_only="blocks.*")
    with pytest.raises(ValueError, match="longce is for models that learn running text"):
        FinetuneConfig(longce=LongCEConfig(truncation=4))
    with pytest.raises(ValueError, match=r"longce.floor \(2\) must lie between 0 and longce.cap"):
        LongCEConfig(floor=2, cap=1)
    with pytest.raises(ValueError, match="must be 0 or more"):
        LongCEConfig(truncation=-1)


def test_the_recipes_are_the_published_stages():
    align, long = recipe("rwkv-x-align"), recipe("rwkv-x-long")
    assert align.batch_size * align.data.sequence_length == 4_096_000
    assert long.batch_size * long.data.sequence_length == 1_024_000
    assert (align.steps, long.steps) == (366, 976)
    assert long.longce == LongCEConfig(truncation=4000, cap=10.0)
