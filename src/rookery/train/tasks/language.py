"""Predict the next token."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rookery.data.packing import PackedBatch, parted
from rookery.data.text import (
    Corpus,
    PackedDocuments,
    Windows,
    is_binidx,
    open_tokens,
    read_documents,
    split,
    tokenize,
    validation_rows,
)
from rookery.models import create_model, load, save_model
from rookery.models.rwkv_x import expand
from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.registry import find
from rookery.tokenizers import Tokenizer, load_tokenizer
from rookery.tokenizers.pairing import NAMES as SHIPPED_TOKENIZERS
from rookery.tokenizers.trie import TrieTokenizer
from rookery.train.config import DataConfig, TrainConfig
from rookery.train.long_context import backward_documents_in_pieces, backward_in_pieces, longce_loss
from rookery.train.parallel import Place, moved
from rookery.train.tasks.base import Task
from rookery.train.tasks.sft import sft_loss


def language_loss(model: LanguageModel, inputs: Tensor, targets: Tensor, l2wrap: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of `targets` [b, t] after `inputs` [b, t], without holding all logits."""
    features, _ = model.features(inputs, None, None)
    return linear_cross_entropy(
        features=features.flatten(0, 1), weight=model.head.weight, targets=targets.flatten(), l2wrap=l2wrap
    )


Batch = tuple[Tensor, Tensor] | PackedBatch
"""Inputs and targets [b, t] of windows, or packed documents."""


class LanguageTask(Task):
    """Windows of a long text, or whole documents."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if not config.data.path:
            raise ValueError("no text to train on: give data.path, for example --set data.path=book.txt")
        self.read(config)
        self.model = self.trained = starting_model(config, self.tokenizer.vocab_size)
        freeze(self.model, config)

    def read(self, config: TrainConfig) -> None:
        """The data, in the tokens of `self.tokenizer`."""
        learned, self.held_out = corpora(config.data, self.tokenizer)
        self.documents: PackedDocuments | None = None
        length, weights = config.data.sequence_length, numbers(config.data.weights)
        if config.data.order != "documents":
            self.windows = Windows(learned, length, config.seed, config.data.order, weights)
            return
        check_pieces(config)
        self.documents = PackedDocuments(learned, length, config.batch_size * length, config.seed, weights)

    def batch(self, step: int) -> Batch:
        if self.documents:
            return self.documents.batch(step)
        return self.windows.batch(step, self.config.batch_size)

    def tokens(self, batch: Batch) -> int:
        return batch[0].numel()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        if isinstance(batch, PackedBatch):
            return {"loss": sft_loss(self.model, batch, self.config.l2wrap)}
        if self.config.longce.truncation:
            return {"loss": longce_loss(self.model, *batch, self.config.longce, self.config.l2wrap)}
        return {"loss": language_loss(self.model, *batch, self.config.l2wrap)}

    def backward(self, batch: Batch, weight: float) -> dict[str, Tensor]:
        config = self.config
        if not config.piece_length:
            return super().backward(batch, weight)
        through = config.piece_gradient == "through"
        settings = {"through": through, "weight": weight, "l2wrap": config.l2wrap}
        if isinstance(batch, PackedBatch):
            return {"loss": backward_documents_in_pieces(self.model, batch, config.piece_length, **settings)}
        return {"loss": backward_in_pieces(self.model, *batch, config.piece_length, **settings)}

    def segment(self, batch: Batch, index: int, parts: int) -> Batch:
        if isinstance(batch, PackedBatch):
            return super().segment(batch, index, parts)
        if batch[0].shape[1] % parts:
            tokens = batch[0].shape[1]
            raise ValueError(f"rows of {tokens} tokens cannot be shared by context_parallel={parts} processes")
        inputs, targets = (half.chunk(parts, dim=1)[index] for half in batch)
        return inputs, targets

    def split(self, batch: Batch, parts: int) -> list[tuple[Batch, float]]:
        if isinstance(batch, PackedBatch):
            return parted(batch, parts)
        if len(batch[0]) % parts:
            raise ValueError(
                f"batch_size={len(batch[0])} rows cannot be divided among {parts} parts (processes × accumulate)"
            )
        inputs, targets = (half.chunk(parts) for half in batch)
        return [(pair, 1 / parts) for pair in zip(inputs, targets)]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the held-out text: nats a token and nats a character; empty if too little is held out."""
        corpus, length = self.held_out, self.config.data.sequence_length
        if len(corpus.tokens) <= length:
            return {}
        inputs, targets = validation_rows(corpus, length)
        place, device = Place.here(self.config.context_parallel), self.model.head.weight.device
        total = 0.0
        for pair in zip(inputs.split(self.config.batch_size), targets.split(self.config.batch_size)):
            rows = pair[0].shape[0]
            part = moved(self.segment(pair, place.part, place.context), device)
            # the mean over the processes, each of which has all rows or its part of each
            total += place.sum([float(language_loss(self.model, *part)) * rows / place.world], device)[0]
        loss = total / inputs.shape[0]
        # the corpus has an end-of-text token more than it has characters for, which the model must predict as well
        if not corpus.characters:
            return {"validation_loss": loss}
        per_character = loss * len(corpus.tokens) / corpus.characters
        return {"validation_loss": loss, "validation_nats_per_character": per_character}

    def export(self, out: Path) -> None:
        """Writes the model in the run's dtype, and its tokenizer beside it unless that ships with the package."""
        name = save_tokenizer(self.tokenizer, self.config.data.tokenizer, out)
        save_model(self.model, out / "model.safetensors", metadata={"tokenizer": name})


def save_tokenizer(tokenizer: Tokenizer, name: str, out: Path) -> str:
    """Writes the tokenizer to `out` unless `name` is one that ships with the package; what a model file calls it."""
    if name in SHIPPED_TOKENIZERS:
        return name
    name = "vocab.txt" if isinstance(tokenizer, TrieTokenizer) else "tokenizer.json"
    tokenizer.save(out / name)
    return name


def starting_model(config: TrainConfig, vocab_size: int) -> LanguageModel:
    """The model before the first step, in float32."""
    if not config.initial:
        return create_model(config.model, seed=config.seed, **{"vocab_size": vocab_size, **config.overrides})
    model = load(config.initial, dtype=torch.float32)
    if find(config.model)[0].name == "rwkv-x" and model.family == "rwkv7":
        model = expand(model, init=config.expand_init, **config.overrides)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"{config.initial!r} knows {model.config.vocab_size} tokens, the tokenizer {config.data.tokenizer!r} has "
            f"{vocab_size}; give the tokenizer that the model was trained with"
        )
    return model


def freeze(model: LanguageModel, config: TrainConfig) -> None:
    """Leaves gradients to the parameters that `config.train_only` names, which must be a trained model's."""
    learn_only(model, config.train_only)
    if config.train_only and not config.initial:
        raise ValueError(f"train_only={config.train_only!r} leaves the rest as it is: give initial, a trained model")


def learn_only(model: LanguageModel, named: str) -> None:
    """Leaves gradients to the parameters of these patterns, all of them for none; ValueError where nothing is named."""
    patterns = named.split(",") if named else ["*"]
    names = {name for name, _ in model.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)}
    if not names:
        raise ValueError(f"train_only={named!r} names no parameter of {model.family}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def corpora(data: DataConfig, tokenizer: Tokenizer) -> tuple[list[Corpus], Corpus]:
    """What is learned from, and the held-out text. Texts are one corpus unless they have weights of their own."""
    learned, held, texts, held_texts = [], [], [], []
    share = 0.0 if data.validation else data.validation_share
    for path in filter(None, data.path.split(",")):
        if is_binidx(path):
            corpus, rest = open_tokens(path, tokenizer.vocab_size, share)
            learned.append(corpus)
            held.append(rest)
            continue
        some, rest = split(list(read_documents(path)), share)
        held_texts += rest
        if data.weights:
            learned.append(tokenize(some, tokenizer))
        else:
            texts += some
    if texts:
        learned.append(tokenize(texts, tokenizer))
    for path in filter(None, data.validation.split(",")):
        if is_binidx(path):
            held.append(open_tokens(path, tokenizer.vocab_size, 0.0)[0])
        else:
            held_texts += read_documents(path)
    return learned, _held_out(held, tokenize(held_texts, tokenizer))


def _held_out(tokens: list[Corpus], texts: Corpus) -> Corpus:
    if not any(len(corpus.tokens) for corpus in tokens):
        return texts
    return Corpus(np.concatenate([*(corpus.tokens[:HELD_OUT] for corpus in tokens), texts.tokens]))


HELD_OUT = 1 << 20
"""Tokens of a held-out binidx data set that are read; `validation_rows` looks at fewer."""


def check_pieces(config: TrainConfig) -> None:
    """ValueError where documents in pieces would leave processes waiting for each other."""
    if config.piece_length and Place.here().world > 1:
        raise ValueError(
            "several processes cannot read documents in pieces (piece_length), of which each has another number; use "
            "piece_length=0 with recompute=true, or one process"
        )


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"data.weights must be numbers separated by commas, got {text!r}") from None
