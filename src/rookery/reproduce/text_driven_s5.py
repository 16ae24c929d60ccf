"""The word problem of S5 in words: a text says which things are swapped, an image of five tokens asks where they are.

Only what the text leaves behind can answer, because the five tokens are the same for every text.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from rookery.data.word_problems import generators
from rookery.families.dir7 import Cross, DIR7Config, create
from rookery.models.dir7 import CROSSES, Text
from rookery.models.rwkv7 import MATRIX_GAIN, initial_2025_05
from rookery.nn.rwkv import set_matrices, set_vectors
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer, learning_rate

POINTS = 5
LENGTH = 12
"""Most swaps in training."""
TRIED = (LENGTH, 2 * LENGTH, 4 * LENGTH)
WORDS = POINTS + len(generators(POINTS))
"""Five words that name the things, and one for the identity and each swap."""
WIDTH = 64


class Asked(nn.Module):
    """Words, one CrossWKV layer, one MLP: places [b, 5, 5] of the five things."""

    def __init__(self, config: DIR7Config, longest: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(WORDS, config.text_size)
        self.questions = nn.Parameter(torch.randn(POINTS, width))
        self.cross = CROSSES[config.cross](config, 0)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, POINTS)
        # attention does not know an order; the recurrences do
        self.places = nn.Embedding(longest, config.text_size) if config.cross == "softmax" else None

    def features(self, words: Tensor) -> Tensor:
        """[b, l, d]"""
        features = self.words(words)
        return features if self.places is None else features + self.places.weight[: words.shape[1]]

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Places [b, 5, 5] after the whole text."""
        return self.answer(self.cross.read(Text(self.features(words), mask)))

    def along(self, words: Tensor) -> Tensor:
        """Places [b, l − 4, 5, 5] after the five names, and after every swap that follows."""
        features, first = self.features(words), POINTS - 1
        batch, length = words.shape
        if hasattr(self.cross, "text"):
            memory, kept = (), []
            for t in range(length):
                memory = self.cross.read(
                    Text(features[:, t : t + 1], torch.ones_like(words[:, :1], dtype=bool)), memory
                )
                kept.append(memory[0])
            memories = (torch.stack(kept[first:], dim=1).flatten(0, 1),)
        else:
            ends = torch.arange(first, length)
            mask = (torch.arange(length) <= ends[:, None]).repeat(batch, 1)
            memories = self.cross.read(Text(features.repeat_interleave(len(ends), 0), mask))
        return self.answer(memories).unflatten(0, (batch, -1))

    def answer(self, memory: tuple[Tensor, ...]) -> Tensor:
        x = self.questions.expand(len(memory[0]), POINTS, -1)
        y, _ = self.cross(layer_norm(x, x.shape[-1:]), (1, POINTS), memory, None)
        x = x + y
        return self.head(layer_norm(x + self.mlp(layer_norm(x, x.shape[-1:])), x.shape[-1:]))


def asked(cross: Cross, removal: float, seed: int) -> Asked:
    """An untrained model. The paper's form stretches the text over the questions, so that each of them meets it."""
    config = create(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        head_dim=WIDTH // 2,
        text_size=WIDTH,
        cross=cross,
        removal=removal,
        align="interpolate",
        text_decay=False,
        **dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 16),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Asked(config, POINTS + max(TRIED))
        if cross != "softmax":
            there = {name for name, _ in model.cross.named_parameters()}
            vectors = {n[4:]: v for n, v in initial_2025_05(config, 0).items() if n[4:] in there}
            set_vectors(model.cross, vectors)
            gains = {n[4:]: g for n, g in MATRIX_GAIN.items() if n[4:] in there}
            generator = torch.Generator().manual_seed(seed)
            set_matrices(model.cross, gains | {"output.weight": 1.0}, generator)
    return model


def problems(generator: np.random.Generator, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Words [count, 5 + length] and the places of the things at first and after each swap, [count, 1 + length, 5]."""
    swaps = generators(POINTS)
    drawn = generator.integers(len(swaps), size=(count, length))
    places = [np.tile(np.arange(POINTS), (count, 1))]
    for step in range(length):
        places.append(np.take_along_axis(swaps[drawn[:, step]], places[-1], axis=1))
    words = np.concatenate([places[0], POINTS + drawn], axis=1)
    return torch.from_numpy(words), torch.from_numpy(np.stack(places, axis=1))


def train(model: Asked, *, steps: int, batch: int, seed: int, lr: float = 3e-3) -> None:
    """Texts of a growing number of swaps, LENGTH from half of the training on; asked for after every word."""
    settings = OptimConfig(
        lr=lr, final_lr=lr / 10, warmup_steps=min(50, steps // 4), weight_decay=0.1, beta2=0.98, eps=1e-8
    )
    optimizer = Optimizer(model, settings, torch.float32)
    for step in range(1, steps + 1):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=step))
        words, places = problems(generator, batch, min(LENGTH, 2 + int((LENGTH - 1) * 2 * step / steps)))
        loss = cross_entropy(model.along(words).flatten(0, 2), places.flatten())
        loss.backward()
        optimizer.step(learning_rate(settings, step, steps))


@torch.no_grad()
def accuracies(model: Asked, rows: int, seed: int) -> dict[str, float]:
    """Share of the things that are found after all swaps, by their number; chance is 0.2."""
    found = {}
    for length in TRIED:
        generator = np.random.Generator(np.random.Philox(key=seed + (1 << 32), counter=length))
        words, places = problems(generator, rows, length)
        answers = model(words, torch.ones_like(words, dtype=torch.bool)).argmax(-1)
        found[str(length)] = float((answers == places[:, -1]).float().mean())
    return found


def measure(cross: Cross, removal: float, seed: int, *, steps: int, batch: int, rows: int) -> dict[str, Any]:
    """Trains one arm and tries it."""
    model = asked(cross, removal, seed)
    train(model, steps=steps, batch=batch, seed=seed)
    return accuracies(model.eval(), rows, seed)
