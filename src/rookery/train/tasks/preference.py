"""Learn which of two answers to prefer: DPO (arXiv 2305.18290) and ORPO (arXiv 2403.07691).

A batch is one packed row: all chosen documents, then all rejected ones in the same order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rookery.checkpoints.atomic import replacing
from rookery.data.jsonl import Preference, Sample
from rookery.data.packing import IGNORED, PackedBatch, collate
from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.state import State
from rookery.train.parallel import Place, moved

Start = Callable[[int], State]


def collate_pairs(pairs: Sequence[Preference]) -> PackedBatch:
    """The pairs in one row, chosen ones first."""
    return collate([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])


def document_log_probs(model: LanguageModel, batch: PackedBatch, start: Start | None = None) -> tuple[Tensor, Tensor]:
    """ln p of the learned tokens of each document, summed, and how many these are, both [documents].

    No more logits are held at a time than `linear_cross_entropy` holds for one document.
    """
    batch = moved(batch, model.head.weight.device)
    ends = batch.cu_seqlens.tolist()
    features, _ = model.features(batch.inputs, start and start(len(ends) - 1), batch.cu_seqlens)
    sums, counts = [], []
    for begin, end in zip(ends, ends[1:]):
        targets = batch.targets[0, begin:end]
        learned = targets != IGNORED
        count = int(learned.sum())
        mean = linear_cross_entropy(
            features=features[0, begin:end][learned], weight=model.head.weight, targets=targets[learned]
        )
        sums.append(-count * mean)
        counts.append(count)
    return torch.stack(sums), torch.tensor(counts, device=features.device)


def dpo_loss(log_probs: Tensor, reference: Tensor, beta: float = 0.1, smoothing: float = 0.0) -> dict[str, Tensor]:
    """DPO's loss of n pairs from ln p of their documents [2n], chosen first, under the model and the reference.

    −(1 − ε) ln σ(βΔ) − ε ln σ(−βΔ), where Δ is how much more than the reference the model prefers the chosen answer and
    ε (`smoothing`) the share of pairs that may be the wrong way round. Also "accuracy", the share of pairs with Δ > 0,
    and "margin", the mean of βΔ.
    """
    chosen, rejected = (log_probs - reference).chunk(2)
    scaled = beta * (chosen - rejected)
    loss = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
    return {"loss": loss.mean(), "accuracy": (scaled > 0).float().mean(), "margin": scaled.detach().mean()}


def orpo_loss(log_probs: Tensor, counts: Tensor, weight: float = 0.1, answers: float = 1.0) -> dict[str, Tensor]:
    """ORPO's loss of n pairs from ln p [2n] and the numbers of learned tokens [2n], chosen first; needs no reference.

    Cross-entropy of the chosen answers plus `weight` (λ) times −ln σ(ln odds(chosen) − ln odds(rejected)), with
    odds(y) = p / (1 − p) of the geometric mean p over the answer's tokens. Also "accuracy" and "margin", of the odds.
    The first term is a mean over tokens, the second over pairs: in a part of a step, whose weight is its share of the
    pairs, `answers` weighs the first by its tokens.
    """
    means = log_probs / counts
    # ln p − ln(1 − p) without taking e^ln p from 1 where both are nearly 1
    odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))
    chosen, rejected = odds.chunk(2)
    pairs = len(chosen)
    learned = -log_probs[:pairs].sum() / counts[:pairs].sum()
    preferred = -logsigmoid(chosen - rejected).mean()
    return {
        "loss": answers * learned + weight * preferred,
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).detach().mean(),
    }


class References:
    """ln p of all pairs under the model as it was before training, computed once and kept in a file."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        """float32 [pairs, 2]: chosen, rejected"""

    def of(self, indices: Sequence[int]) -> Tensor:
        """Those of some pairs in the order of `collate_pairs`, [2n]."""
        return self.log_probs[torch.as_tensor(indices, dtype=torch.int64)].T.flatten()

    @staticmethod
    def of_model(
        model: LanguageModel, pairs: Sequence[Preference], path: str | os.PathLike[str], start: Start | None = None
    ) -> References:
        """Reads them from `path`, or computes them with `model` and writes them there.

        A file that belongs to other pairs or another model is not used and written anew. Several processes, all of
        which must call this, compute a share each; the first one reads and writes.
        """
        from safetensors.torch import save_file

        key, place, device = _key(model, pairs), Place.here(), model.head.weight.device
        kept = _read(path, key) if place.first else None
        if place.sum([float(kept is not None)], device)[0]:
            told = torch.zeros(len(pairs), 2, device=device) if kept is None else kept.to(device)
            place.add_up([told])
            return References(told.cpu())
        found = _log_probs(model, pairs, start, place)
        if place.first:
            with replacing(path) as temporary:
                save_file({"log_probs": found}, temporary, metadata={"key": key})
        return References(found)


def _read(path: str | os.PathLike[str], key: str) -> Tensor | None:
    from safetensors import safe_open

    if not os.path.exists(path):
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("log_probs") if (file.metadata() or {}).get("key") == key else None


@torch.no_grad()
def _log_probs(model: LanguageModel, pairs: Sequence[Preference], start: Start | None, place: Place) -> Tensor:
    """ln p of all pairs on the CPU, float32 [pairs, 2]; every process computes every world-th."""
    device, modes = model.head.weight.device, {module: module.training for module in model.modules()}
    model.eval()  # no dropout
    found = torch.zeros(len(pairs), 2, device=device)
    for first in range(0, len(pairs), place.world):
        # as many calls in each process, because weights in pieces are put together by all of them
        index = min(first + place.rank, len(pairs) - 1)
        log_probs, _ = document_log_probs(model, moved(collate_pairs([pairs[index]]), device), start)
        if first + place.rank < len(pairs):
            found[index] = log_probs.float()
    for module, training in modes.items():
        module.training = training
    place.add_up([found])
    return found.cpu()


def _key(model: LanguageModel, pairs: Sequence[Preference]) -> str:
    digest = hashlib.sha256(model.fingerprint().encode())
    for sample in (sample for pair in pairs for sample in (pair.chosen, pair.rejected)):
        digest.update(np.packbits(sample.learned).tobytes() + sample.tokens.tobytes())
    return digest.hexdigest()


def shortened_pairs(pairs: Sequence[Preference], length: int) -> tuple[list[Preference], int]:
    """Pairs whose documents have at most `length` inputs and something to learn each; and how many were left out."""
    kept = [pair for pair in pairs if all(_fits(sample, length) for sample in (pair.chosen, pair.rejected))]
    return kept, len(pairs) - len(kept)


def _fits(sample: Sample, length: int) -> bool:
    # an answer is not cut: half an answer is another one, and which is better need not be known of halves
    return len(sample.tokens) <= length + 1 and bool(sample.learned.any())
