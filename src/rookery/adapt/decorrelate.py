"""Decorrelated backpropagation for start states (state_methods.md 1.5; the rule of arXiv 2405.02385).

The state is Z R: Z is trained, from zero, and R [head, m, m] makes the inputs z = R x of the trained map uncorrelated
and of equal size, so that a plain step on Z is nearly a Gauss–Newton step on the state. `StartState.fold` puts R into Z
in the end; nothing of it remains in a file. An interpretation: the paper's own way of applying the rule is not public.
"""

import torch
from torch import Tensor

from rookery.adapt.state_tuning import StartState

# p positions, h heads, m key channels of the start state


@torch.no_grad()
def decorrelate(start: StartState, features: list[Tensor], *, ridge: float = 1e-4) -> None:
    """The exact form: R = (E[x xᵀ] + ridge · mean eigenvalue)^(−1/2), once, from the features [p, h, m] of every layer.

    The state stays what it is. ValueError for RWKV-4, whose state is no matrix.
    """
    _check(start)
    start.fold()
    factors = [whitening(x, ridge) for x in features]
    _put(start, factors)


def whitening(x: Tensor, ridge: float = 1e-4) -> Tensor:
    """(E[x xᵀ] + ridge · mean eigenvalue · I)^(−1/2) per head, [h, m, m], computed in float64."""
    values, vectors = torch.linalg.eigh(covariance(x.double()))
    values = values.clamp(min=0) + ridge * values.mean(-1, keepdim=True)
    # a head that reads nothing has no scale of its own
    values = torch.where(values > 0, values, 1)
    return ((vectors * values[..., None, :].rsqrt()) @ vectors.mT).to(x.dtype)


def covariance(x: Tensor) -> Tensor:
    """E[x xᵀ] per head, [h, m, m], of x [p, h, m]."""
    return torch.einsum("phi,phj->hij", x, x) / len(x)


def correlation(x: Tensor) -> Tensor:
    """Mean squared correlation of different channels, per head [h]: 0 where all are uncorrelated."""
    c = covariance(x)
    scale = c.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(c.dtype).tiny).rsqrt()
    off = c * scale[..., None] * scale[..., None, :]
    off = off - torch.diag_embed(off.diagonal(dim1=-2, dim2=-1))
    size = c.shape[-1]
    return off.square().sum((-1, -2)) / max(1, size * (size - 1))


class Decorrelation:
    """The iterative form: one step of R for every step of the optimiser.

    R ← R − η / max(1, |C|) · [(1 − κ)(C − diag C) + κ(diag C − I)] R with C = E[z zᵀ]; κ = 0 decorrelates, κ > 0 also
    makes the sizes equal. R begins as I / rms(x). With `compensate` a step of R leaves the state as it is (Z takes the
    difference); without, as published, it does so only while Z is zero.
    """

    def __init__(
        self,
        start: StartState,
        features: list[Tensor],
        *,
        eta: float = 0.5,
        kappa: float = 0.5,
        compensate: bool = False,
    ) -> None:
        _check(start)
        self.start, self.eta, self.kappa, self.compensate = start, eta, kappa, compensate
        start.fold()
        _put(start, [begin(x) for x in features])

    @torch.no_grad()
    def step(self, features: list[Tensor]) -> None:
        """Moves every layer's R by the features [p, h, m] of this step's texts."""
        factors = [improved(r, x, self.eta, self.kappa) for r, x in zip(self.start.factors, features, strict=True)]
        if self.compensate:
            _put(self.start, factors)
        else:
            self.start.factors = factors


def begin(x: Tensor) -> Tensor:
    """R before the first step: I / rms(x), per head."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    rms = x.square().mean((0, 2)).sqrt()
    return eye / torch.where(rms > 0, rms, 1)[:, None, None]


def improved(r: Tensor, x: Tensor, eta: float = 0.5, kappa: float = 0.5) -> Tensor:
    """R [h, m, m] after one step of the rule on features x [p, h, m]."""
    c = covariance(torch.einsum("hij,phj->phi", r, x))
    diagonal = torch.diag_embed(c.diagonal(dim1=-2, dim2=-1))
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    step = (1 - kappa) * (c - diagonal) + kappa * (diagonal - eye)
    size = torch.linalg.matrix_norm(c).clamp(min=1)[:, None, None]
    return r - eta / size * step @ r


@torch.no_grad()
def _put(start: StartState, factors: list[Tensor]) -> None:
    """Takes other factors for the same state."""
    for layer, (wkv, r) in enumerate(zip(start.wkv, factors, strict=True)):
        value = start.value(layer)
        if value.any():
            wide = torch.linalg.solve(r.double(), value.double(), left=False)
            wkv.copy_(wide)
    start.factors = factors


def _check(start: StartState) -> None:
    if start.is_sums:
        raise ValueError("RWKV-4's state has no matrix whose inputs could be decorrelated; RWKV-5, 6 and 7 have")
