"""Learn the answers of conversations and the documents of files, packed, each from a state of its own."""

from collections.abc import Callable

from torch import Tensor

from rookery.data.packing import IGNORED, PackedBatch
from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.state import State


def sft_loss(
    model: LanguageModel,
    batch: PackedBatch,
    l2wrap: float = 0.0,
    start: Callable[[int], State] | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of the learned tokens.

    `start` gives the state that so many documents begin with, the fresh one where it is None. What is not learned has
    no logits, so it can influence neither the loss nor the direction of learning but as context.
    """
    state = None if start is None else start(batch.cu_seqlens.shape[0] - 1)
    features, _ = model.features(batch.inputs, state, batch.cu_seqlens)
    learned = batch.targets[0] != IGNORED
    return linear_cross_entropy(
        features=features[0][learned], weight=model.head.weight, targets=batch.targets[0][learned], l2wrap=l2wrap
    )
