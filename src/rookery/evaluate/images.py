"""Classifying pictures: names with their probabilities, and accuracy on labelled ones."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.data.image_input import ImageInput, image_input, labelled_batches
from rookery.data.images import Images, Source, read_image
from rookery.models import load


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, want: ImageInput, batch_size: int = 64) -> dict[str, float]:
    """Mean cross-entropy in nats ("loss"), and the share of pictures whose likeliest class is right ("accuracy")."""
    if not len(images):
        raise ValueError("there is no picture to evaluate on")
    model.eval()
    like, loss, right = next(model.parameters()), 0.0, 0
    for pixels, labels in labelled_batches(images, want, batch_size):
        logits = model(pixels.to(like)).float().cpu()
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    return {"loss": loss / len(images), "accuracy": right / len(images)}


@dataclass
class Classifier:
    """A model with the names of its classes and its view of pictures."""

    model: nn.Module
    want: ImageInput
    classes: Sequence[str]

    @staticmethod
    def open(path: str | os.PathLike[str], device: str = "cpu") -> "Classifier":
        """From a file or folder; ValueError for a model of another kind or one without classes."""
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        if checkpoint.family.kind != "image":
            raise ValueError(f"{path} is a model of kind {checkpoint.family.kind!r}; classifying needs one of images")
        if not config.num_classes:
            raise ValueError(f"{path} has no classes, it gives features alone; train a head with `rookery train`")
        names = json.loads(checkpoint.metadata.get("classes", "[]"))
        if len(names) != config.num_classes:
            names = [f"class {i}" for i in range(config.num_classes)]
        return Classifier(load(checkpoint, device=device).eval(), image_input(config, checkpoint.metadata), names)

    @torch.no_grad()
    def classify(self, pictures: Sequence[Source], top: int = 5) -> list[list[tuple[str, float]]]:
        """For each picture the `top` likeliest classes with their probabilities, the likeliest first."""
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        found = []
        for picture in pictures:
            pixels = self.want.prepare(read_image(picture, self.want.channels))
            like = next(self.model.parameters())
            chances = self.model(self.want.normalised(pixels[None]).to(like))[0].float().softmax(-1)
            best = chances.topk(min(top, len(self.classes)))
            found.append([(self.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())])
        return found
