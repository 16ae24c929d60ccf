"""ReLU²: max(x, 0)², the activation of RWKV's channel mix (Primer, arXiv 2109.08668)."""

from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.relu_squared import native, reference, triton

OP = Op(
    "relu_squared",
    [
        Backend("native", native.relu_squared, native.why_not),
        Backend("triton", triton.relu_squared, triton.why_not),
        Backend("reference", reference.relu_squared),
    ],
)


def relu_squared(*, x: Float[Tensor, "..."], backend: str | None = None) -> Float[Tensor, "..."]:
    """max(x, 0)², element by element."""
    return OP(backend=backend, x=x)
