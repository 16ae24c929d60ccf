import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training import assert_resumes_exactly

from rookery.checkpoints import open_checkpoint
from rookery.data.images import drawn_shapes, save_image
from rookery.models import create_model, load, save_model
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train
from rookery.train.tasks.contrastive import ContrastiveTask, clip_loss, siglip_loss

SIZES = {"hidden_size": 32, "image_size": 16, "patch_size": 4, "image_intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"text_layers": 1, "text_intermediate_size": 32, "in_channels": 1, "context_length": 8}


@pytest.fixture
def config(tmp_path):
    """Twelve steps on drawn shapes with two texts each."""
    shapes = drawn_shapes(24)
    rows = []
    for i in range(24):
        name = shapes.classes[shapes.labels[i]]
        save_image(shapes[i], tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "raw": f"a {name}", "synthetic": f"picture of a {name}", "group": name})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {
        "model": "rwkv-clip",
        "overrides": SIZES,
        "data": {"normalise": "plain", **dict.fromkeys(("path", "validation"), str(tmp_path / "pairs.jsonl"))},
        "optim": {"warmup_steps": 2, "lr": 4e-3},
        "out": str(tmp_path / "run"),
        "steps": 12,
        "batch_size": 8,
        "save_every": 5,
        "validate_every": 12,
    }
    return overlay(recipe("clip-nano"), small)


def test_a_recipe_trains_towers_that_bring_their_tokenizer(config):
    train(config)
    rows = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation_loss"] > 0
    metadata = open_checkpoint(config.out).metadata
    assert '"square"' in metadata["text_tokenizer"]
    assert '"size": 16' in metadata["image_input"]
    # a, picture, of, four names, the unknown, and the two that begin and end a text
    assert load(config.out).config.vocab_size == 10


def test_a_resumed_run_is_exact(config, tmp_path):
    config = overlay(config, {"steps": 6, "overrides": {"drop_path": 0.3}})
    train(config)
    half = overlay(config, {"out": str(tmp_path / "half")})
    assert_resumes_exactly(config, half, ContrastiveTask, step=6)


def test_the_scale_is_held_between_1_and_100(config):
    task = ContrastiveTask(config)
    for value, held in ((9.0, math.log(100)), (-1.0, 0.0)):
        task.model.logit_scale.data.fill_(value)
        task.after_step()
        assert task.model.logit_scale.item() == pytest.approx(held)


def test_what_does_not_fit_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="no pairs to train on"):
        ContrastiveTask(overlay(config, {"data": {"path": ""}}))
    with pytest.raises(ValueError, match="'rwkv7-test' is no model of images and texts"):
        ContrastiveTask(replace(config, model="rwkv7-test", overrides={}))
    save_model(create_model("rwkv7-test"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is no model of images and texts"):
        ContrastiveTask(replace(config, initial=str(tmp_path / "m.safetensors")))
    with pytest.raises(ValueError, match="cannot split a batch"):
        task = ContrastiveTask(config)
        task.split(task.batch(1), 2)
    with pytest.raises(ValueError, match="is for pictures of 3 channels, the model has 1"):
        ContrastiveTask(overlay(config, {"data": {"normalise": "clip"}}))


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_a_loss_does_not_care_which_tower_is_which(loss):
    image, text, scale = unit(6, 5), unit(6, 5, seed=1), torch.tensor(7.0)
    torch.testing.assert_close(loss(image, text, scale), loss(text, image, scale))


def test_the_loss_of_equal_pairs_falls_to_nothing_and_of_one_pair_is_nothing():
    image = unit(6, 32)
    losses = [clip_loss(image, image, torch.tensor(s)).item() for s in (1.0, 10.0, 100.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-12
    assert clip_loss(image[:1], -image[:1], torch.tensor(50.0)).item() == 0


def test_the_loss_is_the_cross_entropy_of_both_directions():
    image, text, scale = unit(6, 5), unit(6, 5, seed=1), torch.tensor(7.0)
    logits, places = scale * image @ text.T, torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(clip_loss(image, text, scale), (entropy(logits, places) + entropy(logits.T, places)) / 2)


def test_pairs_of_one_group_share_their_target():
    image = unit(3, 16)
    image = torch.stack([image[0], image[0], image[1]])
    groups = torch.tensor([0, 0, 1])
    shared = clip_loss(image, image, torch.tensor(100.0), groups)
    torch.testing.assert_close(shared, torch.tensor(2 / 3 * math.log(2), dtype=torch.float64))
    assert clip_loss(image, image, torch.tensor(100.0)).item() == pytest.approx(shared.item())
    wrong = siglip_loss(image, image, torch.tensor(20.0)) - siglip_loss(image, image, torch.tensor(20.0), groups)
    assert wrong.item() == pytest.approx(20 / 3, rel=1e-3)  # two of nine answers, 10 each, over three texts
