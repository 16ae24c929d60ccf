import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import assert_resumes_exactly

from rookery.data.augment import Augment
from rookery.data.images import drawn_shapes
from rookery.evaluate.images import Classifier
from rookery.models import create_model, load, save_model
from rookery.recipes import RECIPES, recipe
from rookery.train.config import ImageConfig, overlay
from rookery.train.loop import train
from rookery.train.optim import groups_of
from rookery.train.tasks.images import ImageTask
from rookery.train.tasks.masked import MaskedTask

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def config(tmp_path):
    """Forty steps on drawn shapes of four classes."""
    shapes = drawn_shapes(160)
    held_out = drawn_shapes(40, seed=1)
    arrays = {"train_images": shapes.sources, "train_labels": shapes.labels}
    np.savez(tmp_path / "shapes.npz", test_images=held_out.sources, test_labels=held_out.labels, **arrays)
    small = {
        "overrides": SIZES,
        "data": {"path": str(tmp_path / "shapes.npz")},
        "optim": {"warmup_steps": 4, "lr": 4e-3},
        "augment": {"cutmix": 0.0, "flip": True},
        "out": str(tmp_path / "run"),
        "steps": 40,
        "batch_size": 16,
        "save_every": 20,
        "validate_every": 40,
        "smoothing": 0.0,
    }
    return overlay(recipe("mnist"), small)


def metrics(config):
    return [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_trains_a_classifier_that_can_be_used(config, tmp_path):
    train(config)
    last = metrics(config)[-1]
    assert last["validation_accuracy"] > 0.5  # of four classes
    assert last["tokens"] == 40 * 16 * 16
    classifier = Classifier.open(config.out)
    assert (classifier.want.size, classifier.want.channels, classifier.want.mean) == (16, 1, (0.5,))
    held_out = drawn_shapes(40, seed=1)
    found = classifier.classify([held_out[i] for i in range(40)], top=2)
    right = np.mean([names[0][0] == str(label) for names, label in zip(found, held_out.labels)])
    assert right == pytest.approx(last["validation_accuracy"])
    assert all(len(names) == 2 and names[0][1] >= names[1][1] for names in found)


def test_a_resumed_run_is_exact_with_augmentation_and_stochastic_depth(config, tmp_path):
    changes = {"steps": 6, "save_every": 3, "overrides": {"drop_path": 0.3}}
    changes["augment"] = {"mixup": 0.8, "cutmix": 1.0, "operations": 1, "erase": 0.5, "area": 0.5}
    config = overlay(config, changes)
    train(config)
    half = overlay(config, {"out": str(tmp_path / "half"), "data": {"workers": 2}})
    assert_resumes_exactly(config, half, ImageTask, step=5)


def test_parts_of_a_batch_add_up_to_it(config):
    task = ImageTask(config)
    batch = task.batch(1)
    whole = task.loss(batch)["loss"]
    parts = sum(weight * task.loss(piece)["loss"] for piece, weight in task.split(batch, 4))
    torch.testing.assert_close(parts, whole)
    with pytest.raises(ValueError, match="16 pictures"):
        task.split(batch, 3)


def test_every_picture_comes_once_in_a_pass(config):
    task = ImageTask(config)
    seen = [task.reader.order.item(place) for step in range(1, 11) for place in task.reader.places(step)]
    assert sorted(seen) == list(range(160))


def test_a_trained_model_goes_on_with_another_head_and_slower_lower_layers(config, tmp_path):
    save_model(create_model("vision-rwkv", **SIZES, in_channels=3, num_classes=7), tmp_path / "m.safetensors")
    task = ImageTask(replace(recipe("images-finetune"), initial=str(tmp_path / "m.safetensors"), data=replace(
        config.data, normalise="imagenet")))  # fmt: skip
    assert task.model.config.num_classes == 4
    assert task.batch(1)[0].shape == (64, 3, 16, 16)
    groups = groups_of(task.model, task.config.optim)
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.85**3)
    assert max(group["lr_scale"] for group in groups) == 1


def test_what_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match="no pictures to train on"):
        ImageTask(ImageConfig())
    with pytest.raises(ValueError, match="'rwkv7-test' is no classifier"):
        overrides = {"vocab_size": 8}
        ImageTask(replace(config, model="rwkv7-test", overrides=overrides))
    with pytest.raises(ValueError, match="are of 4 classes, the model knows 3"):
        ImageTask(overlay(config, {"overrides": {"num_classes": 3}}))
    with pytest.raises(ValueError, match="is for pictures of 3 channels, the model has 1"):
        ImageTask(overlay(config, {"data": {"normalise": "imagenet"}}))
    with pytest.raises(ValueError, match=r"augment\.area must lie in"):
        Augment(area=0)
    with pytest.raises(ValueError, match="must be 0 or more"):
        Augment(mixup=-1)


def test_recipes_for_images_name_models_that_exist():
    for name in ("imagenet", "cifar10", "mnist", "digits", "images-finetune"):
        run = RECIPES[name]()
        if run.model.startswith("vision"):
            create_model(run.model, device="meta", **run.overrides)


def test_an_encoder_learns_from_pictures_alone_and_becomes_a_classifier(config, tmp_path):
    masked = recipe("mae")
    small = {"overrides": SIZES, "data": {"path": config.data.path}, "augment": {"area": 1.0, "flip": False}}
    small |= {"decoder_size": 32, "decoder_layers": 1, "out": str(tmp_path / "mae"), "steps": 12, "batch_size": 16}
    masked = overlay(masked, {**small, "data": {"path": config.data.path, "normalise": "plain"}, "accumulate": 1})
    masked = overlay(masked, {"dtype": "float32", "optim": {"lr": 1e-2, "warmup_steps": 2}, "validate_every": 12})
    train(masked)
    rows = [json.loads(line) for line in Path(masked.out, "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation_loss"] > 0
    encoder = load(f"{masked.out}/model.safetensors")
    assert encoder.config.num_classes == 0
    after = ImageTask(replace(config, overrides={}, initial=f"{masked.out}/model.safetensors"))
    assert after.model.config.num_classes == 4
    with pytest.raises(ValueError, match="no pictures to learn from"):
        MaskedTask(replace(masked, data=replace(masked.data, path="")))
