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
from rookery.train.parallel import moved

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


def orpo_loss(log_probs: Tensor, counts: Tensor, weight: float = 0.1) -> dict[str, Tensor]:
    """ORPO's loss of n pairs from ln p [2n] and the numbers of learned tokens [2n], chosen first; needs no reference.

    Cross-entropy of the chosen answers plus `weight` (λ) times −ln σ(ln odds(chosen) − ln odds(rejected)), with
    odds(y) = p / (1 − p) of the geometric mean p over the answer's tokens. Also "accuracy" and "margin", of the odds.
    """
    means = log_probs / counts
    # ln p − ln(1 − p) without taking e^ln p from 1 where both are nearly 1
    odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))
    chosen, rejected = odds.chunk(2)
    answers = len(chosen)
    learned = -log_probs[:answers].sum() / counts[:answers].sum()
    preferred = -logsigmoid(chosen - rejected).mean()
    return {
        "loss": learned + weight * preferred,
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

        A file that belongs to other pairs or another model is not used and written anew.
        """
        from safetensors import safe_open
        from safetensors.torch import save_file

        key = _key(model, pairs)
        if os.path.exists(path):
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return References(file.get_tensor("log_probs"))
        device = next(model.parameters()).device
        with torch.no_grad():
            packed = (moved(collate_pairs([pair]), device) for pair in pairs)
            rows = [document_log_probs(model, batch, start)[0] for batch in packed]
        found = torch.stack(rows).float().cpu()
        with replacing(path) as temporary:
            save_file({"log_probs": found}, temporary, metadata={"key": key})
        return References(found)


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
