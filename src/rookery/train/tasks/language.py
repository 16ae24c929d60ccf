"""Predict the next token."""

from pathlib import Path

import torch
from torch import Tensor

from rookery.data.text import Windows, read_documents, split, tokenize, validation_rows
from rookery.models import create_model, load, save_model
from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.tokenizers import Tokenizer, load_tokenizer
from rookery.tokenizers.pairing import NAMES as SHIPPED_TOKENIZERS
from rookery.tokenizers.trie import TrieTokenizer
from rookery.train.config import DataConfig, TrainConfig
from rookery.train.tasks.base import Task


def language_loss(model: LanguageModel, inputs: Tensor, targets: Tensor, l2wrap: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of `targets` [b, t] after `inputs` [b, t], without holding all logits."""
    features, _ = model.features(inputs, None, None)
    return linear_cross_entropy(
        features=features.flatten(0, 1), weight=model.head.weight, targets=targets.flatten(), l2wrap=l2wrap
    )


class LanguageTask(Task):
    """Windows of one long text."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if not config.data.path:
            raise ValueError("no text to train on: give data.path, for example --set data.path=book.txt")
        learned, held_out = texts(config.data)
        self.model = self.trained = starting_model(config, self.tokenizer.vocab_size)
        self.windows = Windows(tokenize(learned, self.tokenizer), config.data.sequence_length, config.seed)
        self.held_out = tokenize(held_out, self.tokenizer)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.windows.batch(step, self.config.batch_size)

    def tokens(self, batch: tuple[Tensor, Tensor]) -> int:
        return batch[0].numel()

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": language_loss(self.model, *batch, self.config.l2wrap)}

    def split(self, batch: tuple[Tensor, Tensor], parts: int) -> list[tuple[tuple[Tensor, Tensor], float]]:
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
        rows = zip(inputs.split(self.config.batch_size), targets.split(self.config.batch_size))
        total = sum(float(language_loss(self.model, *pair)) * pair[0].shape[0] for pair in rows)
        loss = total / inputs.shape[0]
        # the corpus has an end-of-text token more than it has characters for, which the model must predict as well
        return {
            "validation_loss": loss,
            "validation_nats_per_character": loss * len(corpus.tokens) / corpus.characters,
        }

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
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"{config.initial!r} knows {model.config.vocab_size} tokens, the tokenizer {config.data.tokenizer!r} has "
            f"{vocab_size}; give the tokenizer that the model was trained with"
        )
    return model


def texts(data: DataConfig) -> tuple[list[str], list[str]]:
    """Documents to learn from and held-out ones."""
    files = [list(read_documents(Path(part))) for part in data.path.split(",") if part]
    if data.validation:
        held_out = [text for part in data.validation.split(",") for text in read_documents(Path(part))]
        return [text for file in files for text in file], held_out
    parts = [split(file, data.validation_share) for file in files]
    return [t for learned, _ in parts for t in learned], [t for _, held_out in parts for t in held_out]
