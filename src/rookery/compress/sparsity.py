"""Sparse channel mixes: which hidden units matter is guessed before their weights are read.

A channel mix computes relu(key · x)², which is zero wherever a unit's key row and the input do not agree. RWKV-Lite
(arXiv 2412.10856) guesses these units with a small network, with a copy of the key matrix in one to four bits, or with
both: what either of them finds is used. Each token has guesses of its own, so a text gives the same however it is cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rookery.engine.runners.lite import kept_units, logit

# n tokens, c width, f hidden units


class Predictor(nn.Module):
    """logit(x) = fc2 relu(fc1 x): how likely each hidden unit is to be positive."""

    def __init__(self, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, rank, bias=False)
        self.fc2 = nn.Linear(rank, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Shadow(nn.Module):
    """A key matrix [f, c] in a few bits, whose products with the input say which units are the largest.

    `levels` "minmax": codes 0 … 2^bits − 1 stand for levels evenly between the smallest and the largest weight; the
    offset is the same for all units and left out. "row" (1 bit): each row's bits stand for the means of its weights
    above and below its median.
    """

    codes: Tensor
    """uint8 [f, c]"""
    base: Tensor | None
    step: Tensor | None

    def __init__(self, codes: Tensor, bits: int, base: Tensor | None = None, step: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("base", base)
        self.register_buffer("step", step)

    @classmethod
    def of(cls, weight: Tensor, bits: int, levels: str = "minmax") -> "Shadow":
        """The shadow of a key matrix."""
        weight = weight.detach().float()
        if levels == "row":
            if bits != 1:
                raise ValueError(f"shadow levels of rows are for 1 bit, got {bits}")
            above = weight > weight.median(dim=1, keepdim=True).values
            high, low = _mean_where(weight, above), _mean_where(weight, ~above)
            return cls(above.to(torch.uint8), 1, low, high - low)
        lowest, highest = weight.aminmax()
        scale = ((highest - lowest) / (2**bits - 1)).clamp(min=1e-30)
        return cls(((weight - lowest) / scale).round().to(torch.uint8), bits)

    def forward(self, x: Tensor) -> Tensor:
        scores = x.float() @ self.codes.float().T
        if self.base is None or self.step is None:
            return scores
        return self.base * x.float().sum(-1, keepdim=True) + self.step * scores


def _mean_where(weight: Tensor, chosen: Tensor) -> Tensor:
    return (weight * chosen).sum(1) / chosen.sum(1).clamp(min=1)


class Guess(nn.Module):
    """bool [..., f] for inputs [..., c]: units that the predictor finds likely or whose shadow is among the largest."""

    def __init__(
        self,
        predictor: Predictor | None = None,
        shadow: Shadow | None = None,
        *,
        threshold: float = 0.7,
        quantile: float = 0.95,
    ) -> None:
        super().__init__()
        self.predictor, self.shadow, self.threshold, self.quantile = predictor, shadow, threshold, quantile

    def forward(self, x: Tensor) -> Tensor:
        found = None
        if self.predictor is not None:
            found = self.predictor(x) > logit(self.threshold)
        if self.shadow is not None:
            largest = self._largest(self.shadow(x))
            found = largest if found is None else found | largest
        assert found is not None
        return found

    def _largest(self, scores: Tensor) -> Tensor:
        kept = kept_units(self.quantile, scores.shape[-1])
        # stable: of equal scores the first, as in the compiled runtime
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :kept], True)


class Oracle(nn.Module):
    """Guesses that are always right, for comparison."""

    def __init__(self, key: nn.Linear) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        return self.key(x) > 0


class GuessedKey(nn.Module):
    """A channel mix's key matrix whose other units are zero; relu² keeps them so."""

    def __init__(self, key: nn.Linear, guess: nn.Module) -> None:
        super().__init__()
        self.key, self.guess = key, guess

    def forward(self, x: Tensor) -> Tensor:
        return self.key(x).masked_fill(~self.guess(x), 0)


@torch.no_grad()
def collect(model: nn.Module, rows: Tensor, most: int = 20_000) -> list[Tensor]:
    """What the key matrix of each layer is given while the model reads `rows` [b, t]: [n, c] a layer, n ≤ `most`."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    hooks = [
        block.ffn.key.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0].flatten(0, 1)))
        for block, into in zip(model.blocks, found, strict=True)
    ]
    try:
        seen = 0
        for some in rows.split(8):
            model(some)
            seen += some.numel()
            if seen >= most:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(inputs)[:most] for inputs in found]


@torch.no_grad()
def share_of_zeros(key: nn.Linear, inputs: Tensor) -> float:
    """Share of the hidden units that are zero for these inputs: the premise of all this."""
    return (key(inputs) <= 0).float().mean().item()


def train_predictor(
    key: nn.Linear, inputs: Tensor, *, rank: int = 64, epochs: int = 100, lr: float = 5e-3, seed: int = 0
) -> Predictor:
    """A predictor that learned from `inputs` [n, c] which units are positive, 100 times all of them.

    Binary cross-entropy in which units that are positive weigh as much as all others together. Every fifth input is
    left to `quality`.
    """
    width, hidden = key.in_features, key.out_features
    learned = inputs[torch.arange(len(inputs)) % 5 != 4].detach().float()
    with torch.no_grad():
        labels = (learned @ key.weight.float().T > 0).float()
    generator = torch.Generator().manual_seed(seed)
    predictor = Predictor(width, hidden, rank)
    for layer in (predictor.fc1, predictor.fc2):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
    positive = labels.sum()
    loss_of = nn.BCEWithLogitsLoss(pos_weight=(labels.numel() - positive) / positive.clamp(min=1))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    for _ in range(epochs):
        loss = loss_of(predictor(learned), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return predictor.requires_grad_(False)


@dataclass(frozen=True)
class Quality:
    """How good a guess is, on inputs that it did not learn from."""

    recall: float
    """Share of the positive units that are found."""
    weighted_recall: float
    """The same, each unit weighing its output squared: what is lost matters as far as it is large."""
    precision: float
    """Share of the found units that are positive."""
    loaded: float
    """Share of all units that are found."""


@torch.no_grad()
def quality(key: nn.Linear, guess: nn.Module, inputs: Tensor, *, held_out: bool = True) -> Quality:
    """Measures a guess on `inputs` [n, c], on every fifth of them if these were left out of the training."""
    if held_out:
        inputs = inputs[4::5]
    hidden = key(inputs).relu() ** 2
    found, positive = guess(inputs), hidden > 0
    both = found & positive
    weight = hidden.double() ** 2
    return Quality(
        recall=_share(both.sum(), positive.sum()),
        weighted_recall=_share(weight[both].sum(), weight.sum()),
        precision=_share(both.sum(), found.sum()),
        loaded=found.float().mean().item(),
    )


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) else math.nan


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [bits, f, ⌈c / 8⌉]: the bits of codes [f, c], lowest first, eight inputs a byte, the first in bit 0."""
    hidden, width = codes.shape
    filled = nn.functional.pad(codes.int(), (0, -width % 8)).view(hidden, -1, 8)
    places = 1 << torch.arange(8, dtype=torch.int32)
    planes = [(((filled >> bit) & 1) * places).sum(-1) for bit in range(bits)]
    return torch.stack(planes).to(torch.uint8)


def unpack_bits(planes: Tensor, width: int) -> Tensor:
    """uint8 [f, c]: the codes that `pack_bits` was given."""
    places = torch.arange(8, dtype=torch.int32)
    bits = (planes.int()[..., None] >> places) & 1
    codes = sum((plane << bit for bit, plane in enumerate(bits)), torch.zeros_like(bits[0]))
    return codes.flatten(1)[:, :width].to(torch.uint8)


def sparsify(
    model: nn.Module,
    guesses: Sequence[Guess | Oracle | None],
) -> None:
    """Lets each layer's channel mix use the units of its guess; None leaves a layer dense."""
    for block, guess in zip(model.blocks, guesses, strict=True):
        if guess is not None:
            block.ffn.key = GuessedKey(block.ffn.key, guess)
