"""Bring each picture and its text together, and apart from the others of the batch."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rookery.data.captions import Pair, TextChoice, all_texts, read_pairs
from rookery.data.image_input import named_input
from rookery.data.order import Permuted
from rookery.models import create_model, load, save_model
from rookery.models.clip import LARGEST_SCALE, RWKVCLIP
from rookery.registry import find
from rookery.tokenizers.texts import TextInput, clip_tokenizer, word_tokenizer
from rookery.train.config import PairConfig
from rookery.train.tasks.base import Task

Batch = tuple[Tensor, Tensor, Tensor]
"""Pictures float32 [n, channels, h, w], token ids [n, t], numbers of groups [n]."""


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over features [n, c] of length 1 (arXiv 2103.00020, figure 3); 0 for a single pair.

    Pairs of the same number in `groups` [n] are right for one another: they share the target.
    """
    logits = scale * image @ text.T
    if groups is None:
        groups = torch.arange(len(logits), device=logits.device)
    targets = (groups[:, None] == groups).to(logits)
    targets = targets / targets.sum(1, keepdim=True)
    losses = [-(targets * part.log_softmax(1)).sum(1).mean() for part in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, bias: float = -10.0
) -> Tensor:
    """A yes or no for every picture with every text (arXiv 2303.15343, algorithm 1), summed over texts."""
    logits = scale * image @ text.T + bias
    if groups is None:
        groups = torch.arange(len(logits), device=logits.device)
    signs = 2 * (groups[:, None] == groups).to(logits) - 1
    return -logsigmoid(signs * logits).sum() / max(1, len(logits))


LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


class ContrastiveTask(Task):
    """Pairs of a file; the config's model is of kind "pair".

    Every step draws one of each picture's texts. A batch is not split: each pair is compared with all others.
    """

    def __init__(self, config: PairConfig) -> None:
        self.config = config
        if not config.data.path:
            raise ValueError("no pairs to train on: give data.path, a .jsonl, .csv, .tsv or .tar")
        self.pairs = read_pairs(config.data.path)
        self.held_out = read_pairs(config.data.validation) if config.data.validation else []
        self.choice = TextChoice.of(config.data.text)
        self.order = Permuted(len(self.pairs), config.seed)
        self.model, self.texts = starting_towers(config, self.pairs)
        self.trained = self.model
        sizes = self.model.config
        self.want = named_input(config.data.normalise, sizes.image_size, sizes.in_channels)
        self.dtype = getattr(torch, config.dtype)
        self.loss_of = LOSSES[config.loss]

    def batch(self, step: int) -> Batch:
        self.step, size = step, self.config.batch_size
        pictures, texts, groups = [], [], []
        for place in range((step - 1) * size, step * size):
            generator = np.random.Generator(np.random.Philox(key=self.config.seed + (2 << 32), counter=place))
            item = self.order.item(place)
            pair = self.pairs[item]
            pictures.append(self.config.augment.picture(pair.pixels(self.want.channels), self.want, generator))
            texts.append(self.choice.draw(pair, generator))
            groups.append(pair.group or f"#{item}")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        tokens = torch.from_numpy(self.texts(texts))
        if self.model.config.pad_mode == "masked":  # what fills all texts up need not be read
            tokens = tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1]
        return self.want.normalised(np.stack(pictures)), tokens, torch.tensor([numbers[name] for name in groups])

    def tokens(self, batch: Batch) -> int:
        return len(batch[0]) * self.model.config.image().grid ** 2 + batch[1].numel()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        images, tokens, groups = batch
        self.model.train()
        with torch.random.fork_rng():  # stochastic depth is a function of the step, so that a resumed run is exact
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            image, text, scale = self.model(images.to(self.model.logit_scale.dtype), tokens)
        return {"loss": self.loss_of(image, text, scale, groups), "scale": scale.detach()}

    @torch.no_grad()
    def after_step(self) -> None:
        self.model.logit_scale.clamp_(0, LARGEST_SCALE)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the held-out pairs, each by its first text, in batches of the run's size."""
        if not self.held_out:
            return {}
        self.model.eval()
        losses, device = [], self.model.logit_scale
        for start in range(0, len(self.held_out), self.config.batch_size):
            some = self.held_out[start : start + self.config.batch_size]
            pixels = np.stack([self.want.prepare(pair.pixels(self.want.channels)) for pair in some])
            tokens = torch.from_numpy(self.texts([all_texts([pair])[0] for pair in some])).to(device.device)
            found = self.model(self.want.normalised(pixels).to(device), tokens)
            losses.append(float(self.loss_of(*found)) * len(some))
        return {"validation_loss": sum(losses) / len(self.held_out)}

    def export(self, out: Path) -> None:
        """model.safetensors, which brings its tokenizer and says how it wants its pictures."""
        metadata = {"text_tokenizer": self.texts.tokenizer.to_json()} | self.want.metadata()
        save_model(self.model, out / "model.safetensors", metadata=metadata)


def starting_towers(config: PairConfig, pairs: list[Pair]) -> tuple[RWKVCLIP, TextInput]:
    """The model before the first step, in float32, and its view of texts.

    ValueError where the config names another kind of model.
    """
    given = config.data.tokenizer
    tokenizer = word_tokenizer(all_texts(pairs)) if given == "words" else clip_tokenizer(given)
    if config.initial:
        model = load(config.initial, dtype=torch.float32)
    else:
        if find(config.model)[0].kind != "pair":
            raise ValueError(f"{config.model!r} is no model of images and texts; rwkv-clip is")
        # CLIP's own vocabulary has the two tokens that begin and end a text, words have not
        sizes = {"vocab_size": tokenizer.vocab_size + (2 if given == "words" else 0)}
        model = create_model(config.model, seed=config.seed, **{**sizes, **config.overrides})
    if not isinstance(model, RWKVCLIP):
        raise ValueError(f"{config.initial!r} is no model of images and texts; rwkv-clip is")
    return model, TextInput(tokenizer, model.config.vocab_size, model.config.context_length)
