"""Low-rank projections: two thin matrices in place of a square one, and the training that makes good what is lost.

RWKV-Lite, arXiv 2412.10856. The factors come from a singular value decomposition; the whole model is then trained on.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rookery.errors import BadCheckpoint
from rookery.ops.relu_squared import relu_squared

FAMILIES = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
"""Families that can be compressed: those that the compiled runtime runs."""
PROJECTIONS = ("att.receptance", "att.key", "att.value", "att.gate", "ffn.receptance")
"""What is factored, where it is a square matrix. Outputs and the wide matrices of channel mixes lose too much."""


class LowRank(nn.Module):
    """y = second(first(x)); "enhanced": y = second(relu(first(x))²) + diag ⊙ x, for models that start from scratch."""

    def __init__(self, inputs: int, outputs: int, rank: int, kind: str = "simple") -> None:
        super().__init__()
        if kind not in ("simple", "enhanced"):
            raise ValueError(f"low-rank kind {kind!r} is neither 'simple' nor 'enhanced'")
        self.kind = kind
        self.first = nn.Linear(inputs, rank, bias=False)
        self.second = nn.Linear(rank, outputs, bias=False)
        if kind == "enhanced":
            self.diag = nn.Parameter(torch.empty(outputs).uniform_(-1e-4, 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        low = self.first(x)
        if self.kind == "simple":
            return self.second(low)
        return self.second(relu_squared(x=low)) + self.diag * x


@torch.no_grad()
def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rank, in] and [out, rank] whose product is the closest to `weight` [out, in] of that rank (Eckart and Young)."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Part of a block, name and module of every projection that may be factored."""
    for block in model.blocks:
        for path in PROJECTIONS:
            part, name = path.split(".")
            owner = getattr(block, part)
            module = getattr(owner, name, None)
            square = isinstance(module, nn.Linear) and module.in_features == module.out_features
            if square or isinstance(module, LowRank):
                yield owner, name, module


def factorise(model: nn.Module, divisor: int, kind: str = "simple", *, from_scratch: bool = False) -> None:
    """Puts factors of rank width // divisor in place of a model's projections.

    ValueError for a divisor that leaves no rank, a model that was factored before, and the kind "enhanced" unless the
    model is `from_scratch`, that is, about to be trained: no trained matrix has such factors.
    """
    check_family(model)
    rank = model.config.hidden_size // divisor if divisor >= 1 else 0
    if rank < 1:
        raise ValueError(
            f"low-rank divisor {divisor} must lie between 1 and the width {model.config.hidden_size}: "
            "rank = width // divisor"
        )
    if kind == "enhanced" and not from_scratch:
        raise ValueError(
            "enhanced low-rank projections have a nonlinearity between their factors, which no trained matrix has: "
            "take kind='simple', or from_scratch=True for a model that is about to be trained"
        )
    for owner, name, module in list(projections(model)):
        if isinstance(module, LowRank):
            raise ValueError(f"the projection {name} has two factors already; compress the original model")
        low = LowRank(module.in_features, module.out_features, rank, kind).to(module.weight)
        if kind == "simple":
            first, second = factors(module.weight, rank)
            low.first.weight.data, low.second.weight.data = first.contiguous(), second.contiguous()
        setattr(owner, name, low)


def check_family(model: nn.Module) -> None:
    """BadCheckpoint for a model that is of none of `FAMILIES`."""
    family = getattr(model, "family", type(model).__name__)
    if family not in FAMILIES:
        raise BadCheckpoint(f"models of the family {family} cannot be compressed; {', '.join(FAMILIES)} can")


def windows(tokens: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, length + 1]: pieces of one long row of tokens, anywhere in it."""
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few for pieces of {length + 1}; give more text")
    starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length + 1)].long()


def train_on(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int,
    rows: int = 8,
    length: int = 128,
    lr: float = 5e-4,
    weight_decay: float = 0.001,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Goes on training all weights on pieces of `tokens` [n]; the loss of every step, in nats per token.

    AdamW (0.9, 0.99), warm-up over a tenth of the steps, cosine to a tenth of `lr`, clipped at 1, weight decay on
    matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2 and min(p.shape) > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2 or min(p.shape) <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    losses = []
    for step in range(1, steps + 1):
        warm = min(1.0, step / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = windows(tokens, rows, length, generator)
        logits, _ = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            say(f"  step {step}/{steps}  loss {losses[-1]:.3f}")
    return losses
