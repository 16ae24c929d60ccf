"""Training diffusion models: it is true that …"""

import json
from pathlib import Path

import pytest
import torch

from rookery.errors import UnknownName
from rookery.models import load
from rookery.recipes import recipe
from rookery.train.config import DiffusionOptimConfig, OptimConfig, overlay
from rookery.train.loop import train
from rookery.train.optim import Optimizer
from rookery.train.tasks.diffusion import DiffusionTask

SMALL = {
    "overrides": {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 64},
    "optim": {"warmup_steps": 2},
    "steps": 8,
    "batch_size": 8,
    "save_every": 3,
    "validate_every": 8,
}


@pytest.fixture
def config(tmp_path):
    return overlay(recipe("dir-7-digits"), {**SMALL, "out": str(tmp_path / "run")})


@pytest.fixture
def labels(tmp_path):
    """Diffusion-RWKV with a learned variance on the same digits."""
    sizes = {"image_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "noise_steps": 50}
    changes = {**SMALL, "overrides": sizes, "data": {"path": "digits"}, "out": str(tmp_path / "labels")}
    return overlay(recipe("diffusion-rwkv"), changes)


def metrics(config):
    return [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]


def test_captions_train_a_model_that_knows_their_words_alone(config):
    train(config)
    rows = metrics(config)
    assert rows[-1]["validation_loss"] > 0
    assert rows[0]["tokens"] == 8 * 16
    model = load(config.out + "/model.safetensors")
    assert model.words(["the digit 7", "a handwritten two"]).mask.sum() == 6
    assert model.text_embed.weight.any(dim=1).sum() == 14  # ten names, and "a", "the", "digit", "number" …
    with pytest.raises(ValueError, match="none of the words of 'giraffe'"):
        model.words(["giraffe"])


def test_labels_train_a_model_with_a_learned_variance(labels):
    train(labels)
    first = metrics(labels)[0]
    assert first["error"] == pytest.approx(1.0, abs=0.15)  # a fresh model predicts zero, and noise has variance 1
    assert first["loss"] == pytest.approx(first["error"] + first["bound"])
    assert load(labels.out + "/model.safetensors").config.num_classes == 10


def test_a_fresh_model_has_the_loss_of_knowing_nothing(config):
    task = DiffusionTask(overlay(config, {"overrides": {"prediction": "eps"}, "batch_size": 512}))
    task.step = 1
    assert float(task.loss(task.batch(1))["loss"].detach()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["config", "labels"])
def test_a_resumed_run_is_exact_with_averaged_weights(kind, request, tmp_path, monkeypatch):
    config = request.getfixturevalue(kind)
    train(config)
    half = overlay(config, {"out": str(tmp_path / "half")})
    after = DiffusionTask.after_step

    def stop(self):
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionTask, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(half)
    monkeypatch.setattr(DiffusionTask, "after_step", after)
    train(half)
    one, other = (load(c.out + "/model.safetensors").state_dict() for c in (config, half))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parts_of_a_batch_add_up_to_it(config):
    task = DiffusionTask(config)
    batch = task.batch(1)
    whole = float(task.score(batch)["loss"].detach())
    parts = task.split(batch, 4)
    assert sum(weight * float(task.score(piece)["loss"].detach()) for piece, weight in parts) == pytest.approx(
        whole, rel=1e-5
    )
    with pytest.raises(ValueError, match=r"8 pictures \(batch_size\) cannot be divided among 3 parts"):
        task.split(batch, 3)
    assert torch.equal(task.batch(1).noise, batch.noise)
    assert not torch.equal(task.batch(2).noise, batch.noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": ""}}, "no pictures to train on: give data.path"),
        ({"model": "rwkv7-test", "overrides": {"head_dim": 16}}, "'rwkv7-test' is no diffusion model"),
        ({"model": "dir-7-read-test"}, "needs a table of words: set overrides.text_buckets=512"),
        ({"model": "diffusion-rwkv-test", "overrides": {"num_classes": 4}}, "has 4 classes, the pictures have 10"),
        ({"data": {"path": "nowhere"}}, "nowhere"),
        ({"captions": "a picture"}, r"captions need \{\} for the name of a class, and none may be empty; got 'a pict"),
        ({"captions": "{}||a {}"}, "none may be empty"),
        ({"drop": 1.5}, "drop is a share from 0 to 1, got 1.5"),
    ],
)
def test_what_cannot_be_trained_is_refused(config, changes, message):
    plain = overlay(recipe("dir-7-digits"), {"steps": 1})
    object.__setattr__(plain, "overrides", {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DiffusionTask(overlay(plain, changes))


# averaged weights


def moved(ema, steps=3):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(model.weight)
    optimizer = Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.0, ema=ema, eps=1e-8), torch.float32)
    seen = []
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step(0.1)
        seen.append(model.weight.detach().clone())
    return model, optimizer, seen


def test_averages_follow_the_weights_fast_at_first():
    model, optimizer, seen = moved(0.9999)
    average = torch.ones(1, 2)
    for steps, weight in enumerate(seen, start=1):
        average = average.lerp(weight, 1 - (1 + steps) / (10 + steps))
    with optimizer.averaged():
        torch.testing.assert_close(model.weight.detach(), average)
    torch.testing.assert_close(model.weight.detach(), seen[-1])


def test_an_average_that_keeps_nearly_nothing_is_the_weights():
    model, optimizer, seen = moved(1e-9)
    with optimizer.averaged():
        torch.testing.assert_close(model.weight.detach(), seen[-1])


def test_averages_are_refused_where_they_make_no_sense():
    for wrong in ({"ema": 1.0}, {"ema": 0.5, "name": "schedule-free"}):
        with pytest.raises(ValueError, match=r"optim\.ema must lie in"):
            OptimConfig(**wrong)
    with pytest.raises(UnknownName, match="ema is float"):
        overlay(DiffusionOptimConfig(), {"ema": "much"})
