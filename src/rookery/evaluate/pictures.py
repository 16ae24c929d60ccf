"""What `rookery eval` measures of models of images, and of images and texts."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from rookery.data.captions import KINDS, read_pairs
from rookery.data.images import open_images
from rookery.evaluate.images import Classifier, evaluate
from rookery.evaluate.retrieval import Embedder, build_zero_shot_classifier, retrieval_metrics


def images(model: str, data: str, *, device: str, limit: int | None, tokenizer: str | None) -> dict[str, Any]:
    """Accuracy of a classifier on the held-out part of `data` (see `open_images`), classes matched by their names."""
    classifier = Classifier.open(model, device)
    held_out = open_images(data, classifier.want.channels)[1]
    if list(held_out.classes) != list(classifier.classes):
        named = all(name.startswith("class ") for name in classifier.classes)
        if not named or len(held_out.classes) != len(classifier.classes):
            raise ValueError(
                f"the model knows {len(classifier.classes)} classes ({classifier.classes[0]} …), the pictures are of "
                f"{len(held_out.classes)} ({held_out.classes[0]} …)"
            )
    chosen = held_out.select(some(len(held_out), limit))
    return {"pictures": len(chosen), **evaluate(classifier.model, chosen, classifier.want)}


def zero_shot(model: str, data: str, *, device: str, limit: int | None, tokenizer: str | None) -> dict[str, Any]:
    """Accuracy of a model of images and texts that is told the classes of `data` by their names alone."""
    embedder = Embedder.open(model, tokenizer, device)
    held_out = open_images(data, embedder.want.channels)[1]
    chosen = held_out.select(some(len(held_out), limit))
    embedder.embed_texts([])  # says what is missing where the model has no tokenizer
    names = [name.replace("_", " ") for name in chosen.classes]
    columns = build_zero_shot_classifier(embedder.model, embedder.texts, names).cpu()
    logits = embedder.images([chosen[i] for i in range(len(chosen))]) @ columns * float(embedder.model.scale().detach())
    labels = torch.from_numpy(chosen.labels)
    top = logits.topk(min(5, len(names))).indices == labels[:, None]
    figures = {"accuracy": float(top[:, 0].float().mean()), "among the first five": float(top.any(1).float().mean())}
    return {"pictures": len(chosen), "loss": float(cross_entropy(logits, labels)), **figures}


def retrieval(model: str, data: str, *, device: str, limit: int | None, tokenizer: str | None) -> dict[str, Any]:
    """Recall both ways on a file of pairs, by each kind of text that all of them have; ties count as lost."""
    embedder = Embedder.open(model, tokenizer, device)
    pairs = read_pairs(data)[:limit]
    features = embedder.images([pair.source for pair in pairs])
    found: dict[str, Any] = {"pictures": len(pairs)}
    for kind in KINDS:
        texts = [pair.texts.get(kind) for pair in pairs]
        if all(texts):
            words = embedder.embed_texts([text if isinstance(text, str) else " ".join(text) for text in texts])
            found[kind] = retrieval_metrics(features @ words.T)
    return found


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"images": images, "zero-shot": zero_shot, "retrieval": retrieval}
"""Task -> function of a model's path and the data's."""


def run(
    task: str,
    model: str | os.PathLike[str] | None,
    data: str | None,
    *,
    device: str = "cpu",
    limit: int | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """The result of one of `TASKS` as numbers that JSON can hold. ValueError without a model or data."""
    if model is None or data is None:
        raise ValueError(f"the task {task!r} needs data and a model: rookery eval {task} DATA --model FILE")
    began = time.perf_counter()
    found = TASKS[task](os.fspath(model), data, device=device, limit=limit, tokenizer=tokenizer)
    return {"task": task, **found, "seconds": round(time.perf_counter() - began, 3)}


def some(count: int, limit: int | None) -> np.ndarray:
    """`limit` numbers below `count`, spread evenly: sets are often sorted by class."""
    limit = count if limit is None else max(1, min(limit, count))
    return np.linspace(0, count - 1, limit).round().astype(np.int64) if count else np.empty(0, np.int64)
