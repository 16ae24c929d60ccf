"""Turn a transformer into an RWKV: its mixers learn to answer as attention did, then the whole learns what it says."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from rookery.adapt.convert_transformer import align, convert, detach_first_values, load_teacher, mixers
from rookery.adapt.distillation import cached_loss, distillation_loss, top_k
from rookery.adapt.verify import verify
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.atomic import replacing
from rookery.data.packing import IGNORED, PackedBatch
from rookery.data.text import validation_rows
from rookery.models import load, save_model
from rookery.models.arwkv import Converted
from rookery.models.transformer import Transformer
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import resolve
from rookery.train.config import DistillConfig
from rookery.train.parallel import Place, device_of, moved
from rookery.train.tasks.language import Batch, LanguageTask, save_tokenizer

log = logging.getLogger("rookery")

VERIFIED_ROWS = 64
"""Held-out rows that a stage's result is judged on."""


class DistillTask(LanguageTask):
    """What a `DistillConfig` says."""

    model: Converted

    def __init__(self, config: DistillConfig) -> None:
        _check(config)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        teacher = load_teacher(config.teacher, dtype=torch.float32)
        self.tokenizer = _tokenizer(config, config.teacher, teacher.config.vocab_size)
        self.read(config)
        self.model = self._student(teacher)
        known = self.model.config.vocab_size
        if config.top_k >= known:
            raise ValueError(f"top_k={config.top_k} must be less than the {known} tokens that there are")
        self.trained: nn.Module = self.model
        self._freeze()
        if config.detach_v_first:
            detach_first_values(self.model)
        self.teacher: Transformer | None = teacher.to(device=device_of(config.device), dtype=self.dtype)
        self.fingerprint = teacher.fingerprint()

    def _student(self, teacher: Transformer) -> Converted:
        config, how = self.config, self.config.convert
        if not config.student:
            same = {"keep_attention": how.keep_attention, "untie": how.untie, "seed": config.seed}
            return convert(teacher, how.to, **same, **how.settings)
        student = load(config.student, dtype=torch.float32)
        if not isinstance(student, Converted):
            raise ValueError(f"{config.student!r} is of family {student.family}, not a converted transformer")
        mine, theirs = student.config.vocab_size, teacher.config.vocab_size
        own = _tokenizer(config, config.student, mine)
        if mine > theirs or _differs(own, self.tokenizer):
            raise ValueError(
                f"the student knows {mine} tokens ({own.name}), the teacher {theirs} ({self.tokenizer.name}): "
                "they must have one vocabulary"
            )
        return student

    def _freeze(self) -> None:
        """Only the time mixes learn when they are aligned; MLPs may stay later, too."""
        if self.config.stage == "align":
            self.model.requires_grad_(False)
            for mixer in mixers(self.model).values():
                mixer.requires_grad_(True)
        elif self.config.freeze_mlp:
            for block in self.model.model.layers:
                block.mlp.requires_grad_(False)

    def ready(self, out: Path) -> None:
        """Fills the cache of what the teacher says, if one is asked for; the teacher goes then."""
        if not self.config.top_k:
            return
        self.cache = Path(self.config.cache or out / "teacher")
        place, count = Place.here(), self.config.accumulate
        for step in range(1, self.config.steps + 1):
            if place.first and step % max(1, self.config.steps // 10) == 0:
                log.info("asking the teacher: step %d of %d", step, self.config.steps)
            # the parts of this process: nobody else reads what is kept of them
            parts = self.split(self.batch(step), place.world * count)[place.rank * count :][:count]
            for part, _ in parts:
                if not (path := self._cached(part)).is_file():
                    self._write(path, part)
        self.teacher = None

    def _cached(self, batch: Batch) -> Path:
        digest = hashlib.sha256(f"{self.fingerprint} {self.model.config.vocab_size} {self.config.top_k}".encode())
        for tensor in _given(batch):
            digest.update(tensor.cpu().numpy().tobytes())
        return self.cache / f"{digest.hexdigest()[:32]}.safetensors"

    def _write(self, path: Path, batch: Batch) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        features = self._teacher_features(moved(batch, self.teacher.head.weight.device))
        weight = self.teacher.head.weight[: self.model.config.vocab_size]
        pairs = [top_k(part @ weight.T, self.config.top_k) for part in features.split(512)]
        ids, log_probs = (torch.cat(parts).cpu() for parts in zip(*pairs))
        with replacing(path) as temporary:
            save_file({"ids": ids.to(torch.int32), "log_probs": log_probs.to(torch.float16)}, temporary)

    @torch.no_grad()
    def _teacher_features(self, batch: Batch) -> Tensor:
        tokens, ends = _given(batch)
        return self.teacher.features(tokens, None, ends if ends.numel() else None)[0].flatten(0, 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        tokens, ends = _given(batch)
        ends = ends if ends.numel() else None
        if config.stage == "align":
            return {"loss": align(self.teacher, self.model, tokens, ends, square=config.distance == "square").loss}
        features = self.model.features(tokens, None, ends)[0].flatten(0, 1)
        weight = self.model.head.weight
        if config.top_k:
            from safetensors.torch import load_file

            kept = moved(load_file(self._cached(batch)), features.device)
            kl = cached_loss(features, weight, kept["ids"].long(), kept["log_probs"])
        else:
            wanted, adaptive = self._teacher_features(batch), config.divergence == "adaptive"
            kl = distillation_loss(features, weight, wanted, self.teacher.head.weight, adaptive=adaptive)
        if not config.text_weight:
            return {"loss": kl}
        targets = (batch.targets if isinstance(batch, PackedBatch) else batch[1]).flatten()
        learned = targets != IGNORED
        text = linear_cross_entropy(features=features[learned], weight=weight, targets=targets[learned])
        return {"loss": kl + config.text_weight * text, "kl": kl.detach(), "text_loss": text.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The stage's loss on held-out text, as "validation_loss"; nothing where the teacher is in a cache alone."""
        rows = self._held_out_rows()
        if rows is None or self.teacher is None:
            return {}
        device, total = self.model.head.weight.device, 0.0
        for some in rows.split(self.config.batch_size):
            pair = moved((some[:, :-1], some[:, 1:]), device)
            total += float(self.loss(pair)["loss"]) * len(some)
        return {"validation_loss": total / len(rows)}

    def _held_out_rows(self) -> Tensor | None:
        """[n, sequence_length + 1], None where too little text is held out."""
        length = self.config.data.sequence_length
        if len(self.held_out.tokens) <= length:
            return None
        inputs, targets = validation_rows(self.held_out, length)
        return torch.cat([inputs, targets[:, -1:]], dim=1)[:VERIFIED_ROWS]

    def export(self, out: Path) -> None:
        """The model, and what it kept of its teacher: verification.json and verification.txt."""
        name = save_tokenizer(self.tokenizer, self.tokenizer.name, out)
        save_model(self.model, out / "model.safetensors", metadata={"tokenizer": name})
        rows = self._held_out_rows()
        if rows is None:
            return
        teacher = self.teacher or load_teacher(self.config.teacher)
        dtype = self.model.head.weight.dtype
        verify(teacher.to(device="cpu", dtype=dtype), self.model, rows, batch=self.config.batch_size).write(out)


def _check(config: DistillConfig) -> None:
    if not config.teacher:
        raise ValueError("no teacher: give a transformer, for example --set teacher=FOLDER")
    if not config.data.path:
        raise ValueError("no text to distil on: give data.path, for example --set data.path=text.jsonl")
    if config.piece_length:
        raise ValueError("distilling reads whole rows: use piece_length=0")
    if config.context_parallel > 1:
        raise ValueError("distilling reads whole rows: use context_parallel=1")


def _given(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens [b, t], and where documents begin and end; nothing for windows."""
    if isinstance(batch, PackedBatch):
        return batch.inputs, batch.cu_seqlens
    return batch[0], batch[0].new_empty(0)


def _tokenizer(config: DistillConfig, path: str, vocab_size: int) -> Tokenizer:
    checkpoint = open_checkpoint(path)
    given = config.data.tokenizer or None
    return resolve(given, vocab_size=vocab_size, path=checkpoint.path, metadata=checkpoint.metadata)


PROBE = "The quick brown fox — 3.14 × 2 = 6.28\n\t{'naïve': \"日本語\"}"
"""Two tokenizers that cut this alike are taken for one."""


def _differs(one: Tokenizer, other: Tokenizer) -> bool:
    if one.vocab_size != other.vocab_size:
        return True
    try:
        return one.encode(PROBE) != other.encode(PROBE)
    except ValueError:  # a vocabulary that lacks characters of it: sizes must do
        return False
