"""ReLU². This file is the definition."""

from jaxtyping import Float
from torch import Tensor


def relu_squared(*, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.relu().square()
