"""Bi-WKV as two cumulative sums, on any device: |ω| t is bounded by a parameter, and so is every e^(±ω t).

With θ_i = ω (i − (t − 1) / 2), whose size is at most half of the parameter, and κ = k − max k:

    Σ_{i<t} e^(−ω (t−1−i)) x_i = e^(ω − θ_t) Σ_{i<t} e^θ_i x_i       and the mirror image for i > t

gives numerator and denominator for x = e^κ v and x = e^κ. The weights of a pair do not depend on which of the two is
the query, so gradients are the same sums over ĝ = dy / denominator, and that of ω has the distance in it as a sum of
sums:

    dv = e^κ Σ[ĝ]    dk = e^κ (v Σ[ĝ] − Σ[ĝ y])    dμ = Σ ĝ e^(κ + μ) (v − y)    dω = −Σ ĝ (M[v] − y M[1])
"""

import torch
from torch import Tensor

LARGEST = {torch.float32: 40.0, torch.float64: 400.0}
"""Of |ω| t and |μ|: sums of gradients reach e^(1.5 |ω| t)."""


def why_not(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> str | None:
    """Reason that this call cannot run, or None. Numbers are looked at where that costs nothing: on the CPU."""
    if compat != "exact":
        return f"it computes the exact form, not {compat!r}"
    if omega.device.type == "cpu" and omega.numel() and not torch.compiler.is_compiling():
        largest = LARGEST[torch.promote_types(k.dtype, torch.float32)]
        found = max(float(omega.detach().abs().max()) * k.shape[1], float(mu.detach().abs().max()))
        if not found <= largest:
            return f"omega times the number of tokens, or mu, goes up to {found:.4g}, and its sums need {largest:.4g}"
    return None


def bi_wkv(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> Tensor:
    """As `rookery.ops.bi_wkv.bi_wkv`."""
    return _forward(omega, mu, k, v)


@torch.library.custom_op("rookery::bi_wkv_cumsum", mutates_args=())
def _forward(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if k.shape[1] < 2 or not k.numel():  # one token is its average, to the last bit
        return v.clone(memory_format=torch.contiguous_format)
    call = _Call(omega, mu, k, v)
    return call.average()[0].to(v.dtype)


@_forward.register_fake
def _(_omega, _mu, _k, v):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("rookery::bi_wkv_cumsum_backward", mutates_args=())
def _backward(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if k.shape[1] < 2 or not k.numel():
        return torch.zeros_like(omega), torch.zeros_like(mu), torch.zeros_like(k), grad_y.clone()
    call = _Call(omega, mu, k, v)
    y, total = call.average()
    scaled = grad_y.to(y.dtype) / total
    of_v = call.weigh(scaled)
    grad_k = call.key * (call.v * of_v - call.weigh(scaled * y))
    grad_mu = (scaled * call.key * call.bonus * (call.v - y)).sum((0, 1))
    grad_omega = -(scaled * (call.moment(call.key * call.v) - y * call.moment(call.key))).sum((0, 1))
    grads = grad_omega, grad_mu, grad_k, call.key * of_v
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (omega, mu, k, v)))


@_backward.register_fake
def _(omega, mu, k, v, _grad_y):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (omega, mu, k, v))


_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _Call:
    """What forward and backward share: e^κ, e^(±θ), and sums over all tokens."""

    def __init__(self, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor) -> None:
        wide, tokens = torch.promote_types(k.dtype, torch.float32), k.shape[1]
        omega, k, self.v = omega.to(wide), k.to(wide), v.to(wide)
        self.bonus = mu.to(wide).exp()
        self.key = (k - k.amax(1, keepdim=True)).exp()
        theta = omega * (torch.arange(tokens, device=k.device, dtype=wide) - (tokens - 1) / 2)[:, None]  # [t, c]
        self.rise, self.fall = theta.exp(), (-theta).exp()
        self.step = omega.exp()

    def average(self) -> tuple[Tensor, Tensor]:
        """The outputs and their denominators."""
        total = self.weigh(self.key)
        return self.weigh(self.key * self.v) / total, total

    def weigh(self, x: Tensor) -> Tensor:
        """Σ_i of x_i by the weight of its distance."""
        sides = self.fall * _before(self.rise * x) + self.rise * _after(self.fall * x)
        return self.step * sides + self.bonus * x

    def moment(self, x: Tensor) -> Tensor:
        """Σ_i of x_i by the weight of its distance and that distance, less 1."""
        # a sum of sums has no difference that could cancel
        past, future = _before(_before(self.rise * x)), _after(_after(self.fall * x))
        return self.step * (self.fall * past + self.rise * future)


def _before(x: Tensor) -> Tensor:
    """Sums over the tokens before each."""
    return torch.nn.functional.pad(x[:, :-1].cumsum(1), (0, 0, 1, 0))


def _after(x: Tensor) -> Tensor:
    """Sums over the tokens after each."""
    return _before(x.flip(1)).flip(1)
