"""Predict the next token."""

from torch import Tensor

from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy


def language_loss(model: LanguageModel, inputs: Tensor, targets: Tensor, l2wrap: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of `targets` [b, t] after `inputs` [b, t], without holding all logits."""
    features, _ = model.features(inputs, None, None)
    return linear_cross_entropy(
        features=features.flatten(0, 1), weight=model.head.weight, targets=targets.flatten(), l2wrap=l2wrap
    )
