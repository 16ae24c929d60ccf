"""The head and the cross-entropy in one, without ever holding the logits of a long batch."""

from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.linear_cross_entropy import chunked, native, reference

OP = Op(
    "linear_cross_entropy",
    [
        Backend("native", native.linear_cross_entropy, native.why_not),
        Backend("chunked", chunked.linear_cross_entropy),
        Backend("reference", reference.linear_cross_entropy),
    ],
)


def linear_cross_entropy(
    *,
    features: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    ignore_index: int = -100,
    l2wrap: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of softmax(features · weightᵀ) over the targets that are not `ignore_index`.

    `l2wrap` (1e-4 in the official recipe, core.md 1.10) adds to the gradient, not to the value, l2wrap / n times the
    largest logit at the largest logit of every token; it scales with the upstream gradient. NaN if every target is
    ignored, as in torch.
    """
    return OP(
        backend=backend,
        features=features,
        weight=weight,
        targets=targets,
        ignore_index=ignore_index,
        l2wrap=l2wrap,
    )
