"""Fine-tuning: a model that exists, what of it is trained, conversations or pairs, and what is written at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rookery.adapt.config import ADAPTERS, IN_RWKV_PEFT
from rookery.adapt.decorrelate import decorrelate
from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.peft import (
    INITIAL,
    attach,
    begin_from,
    fingerprint_of,
    merge,
    restart_pissa,
    save_adapter,
    save_rwkv_peft,
)
from rookery.adapt.quantised import quantise_base, restore_base
from rookery.adapt.read_features import read_features
from rookery.adapt.state_tuning import StartState, save_start, started_from
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.atomic import replacing
from rookery.data.jsonl import Preference, Sample, read_preferences, read_samples
from rookery.data.packing import IGNORED, PackedBatch, Packs, collate, fitted, parted
from rookery.engine.llm import EMBEDDED
from rookery.models import load, save_model
from rookery.models.temporal_perspectives import TemporalPerspectives
from rookery.tokenizers.pairing import resolve
from rookery.train.config import FinetuneConfig
from rookery.train.long_context import backward_documents_in_pieces
from rookery.train.parallel import Place, moved
from rookery.train.tasks.base import Task
from rookery.train.tasks.language import check_pieces, learn_only, numbers, save_tokenizer
from rookery.train.tasks.preference import (
    References,
    collate_pairs,
    document_log_probs,
    dpo_loss,
    orpo_loss,
    shortened_pairs,
)
from rookery.train.tasks.sft import sft_loss

log = logging.getLogger("rookery")


class Chosen(NamedTuple):
    """Documents of one step."""

    packed: PackedBatch
    indices: np.ndarray
    answers: float = 1.0
    """Of a part of a step of pairs: its share of the chosen answers' learned tokens over its share of the pairs."""


class FinetuneTask(Task):
    """What a `FinetuneConfig` says."""

    def __init__(self, config: FinetuneConfig) -> None:
        if not config.base:
            raise ValueError("no model to fine-tune: give base, for example --set base=model.pth or base=embedded")
        if not config.data.path:
            raise ValueError("nothing to learn from: give data.path, for example --set data.path=chats.jsonl")
        if config.piece_length and config.learn != "sft":
            raise ValueError("preferences are learned from whole answers: use piece_length=0")
        check_pieces(config)
        self.config = config
        # the state that texts start from is float32 always, as every state; the model it starts has the run's dtype
        self.dtype = torch.float32 if config.adapt.method == "state" else getattr(torch, config.dtype)
        self.path = str(EMBEDDED) if config.base == "embedded" else config.base
        told = open_checkpoint(self.path).metadata
        self.model = load(self.path, dtype=torch.float32)
        vocab_size = self.model.config.vocab_size
        self.tokenizer = resolve(config.data.tokenizer or None, vocab_size=vocab_size, path=self.path, metadata=told)
        self.start: StartState | None = None
        self.initial: dict[str, Tensor] = {}
        self.trained: nn.Module = self._adapt()
        self.documents, self.held_out, sources = self._read()
        self.packs = self._packs(self.documents, config.seed, sources, numbers(config.data.weights))
        if isinstance(self.start, KernelStart) and not config.adapt.start:
            self._calibrate(self.start)
        self.references: References | None = None

    def _adapt(self) -> nn.Module:
        config = self.config
        if config.adapt.method == "full":
            learn_only(self.model, config.train_only)
            return self.model
        if config.adapt.method in ADAPTERS:
            self._attach(Path(config.out) / INITIAL)
            if config.adapt.base:
                quantise_base(self.model, config.adapt.base)
            return self.model
        if config.adapt.method == "perspectives":
            if config.recompute or config.compile:
                # mixing vectors are exchanged during a call; what is computed again or compiled would not notice
                raise ValueError("adapt.method=perspectives goes with neither recompute nor compile; leave them out")
            self.model = TemporalPerspectives.from_base(self.model, config.adapt.perspectives, seed=config.seed)
            self.model.freeze("mixes", "convert")
            return self.model
        self.model.requires_grad_(False).eval().to(getattr(torch, config.dtype))
        adapt = config.adapt
        if adapt.start:
            self.start = started_from(adapt.start, self.model, shifts=adapt.shifts)
        elif adapt.features:
            form = {"kernel": adapt.kernel, "transition": adapt.transition, "shifts": adapt.shifts}
            self.start = KernelStart(self.model, features=adapt.features, **form)
        else:
            self.start = StartState(self.model, shifts=adapt.shifts)
        self.model = self.start.model[0]
        return self.start

    def _calibrate(self, start: KernelStart) -> None:
        """Support vectors from the keys of what is learned; the same for every run on these documents."""
        tokens = self.batch(1).packed.inputs
        alike = start.calibrate(tokens, seed=self.config.seed)
        log.info("kernel state: likeness of the features, by layer: %s", " ".join(f"{x:.3f}" for x in alike))

    def _attach(self, kept: Path) -> None:
        """Adapters; a resumed PiSSA takes up the pair that it began with, see `restart_pissa`."""
        from safetensors.torch import load_file, save_file

        adapt = self.config.adapt
        if adapt.method == "pissa" and kept.is_file():
            self.initial = load_file(kept)
            restart_pissa(self.model, adapt, self.initial)
            return
        self.initial = attach(self.model, adapt, self.config.seed)
        if adapt.start:
            begin_from(self.model, adapt.start)
        if self.initial and Place.here().first:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in self.initial.items()}, temporary)

    def _read(self) -> tuple[list[Any], list[Any], list[int]]:
        """Documents, samples or pairs, that are learned and that are held out; how many learned ones each file has."""
        data = self.config.data
        learned, held_out, sources = [], [], []
        for path in filter(None, data.path.split(",")):
            some, rest = _split(self._documents(path), 0.0 if data.validation else data.validation_share)
            if not some:
                raise ValueError(f"nothing is left to learn from {path!r}; is data.sequence_length too small?")
            learned += some
            held_out += rest
            sources.append(len(some))
        return learned, held_out + (self._documents(data.validation) if data.validation else []), sources

    def _documents(self, paths: str) -> list[Any]:
        config, length = self.config, self.config.data.sequence_length
        if config.learn == "sft":
            documents, changed = fitted(read_samples(paths, self.tokenizer, config.template, config.mask), length)
        else:
            documents, changed = shortened_pairs(read_preferences(paths, self.tokenizer, config.template), length)
        if changed:
            reason = f"are longer than data.sequence_length, {length} tokens, and were cut or left out"
            log.warning("%s: %d documents %s", paths, changed, reason)
        return documents

    def _packs(self, documents: Sequence[Any], seed: int, *mixed: Sequence[float]) -> Packs:
        config = self.config
        rows = config.batch_size if config.learn == "sft" else max(2, config.batch_size)  # a pair is two documents
        return Packs([_length(document) for document in documents], rows * config.data.sequence_length, seed, *mixed)

    def ready(self, out: Path) -> None:
        if self.config.adapt.decorrelate:
            # with the state still zero, so that a resumed run finds the same factors
            packed = moved(self.batch(1), next(self.model.parameters()).device).packed
            mask = packed.targets != IGNORED
            decorrelate(self.start, read_features(self.start, packed.inputs, cu_seqlens=packed.cu_seqlens, mask=mask))
        if self.config.learn == "dpo":
            pairs = [*self.documents, *self.held_out]
            self.references = References.of_model(self.model, pairs, out / "reference.safetensors", self.start)

    def batch(self, step: int) -> Chosen:
        self.step, self.part = step, 0
        indices = self.packs.indices(step)
        return Chosen(_packed([self.documents[i] for i in indices]), indices)

    def split(self, batch: Chosen, parts: int) -> list[tuple[Chosen, float]]:
        """Whole documents, or pairs, in each part. Parts that none are left for get one whose share is 0."""
        if self.config.learn == "sft":
            return [(Chosen(part, batch.indices), weight) for part, weight in parted(batch.packed, parts)]
        learned = _answers(self.documents[i] for i in batch.indices)
        found = []
        for of in np.array_split(batch.indices, parts):
            share = len(of) / len(batch.indices)
            of = of if len(of) else batch.indices[:1]
            some = [self.documents[i] for i in of]
            answers = _answers(some) / learned / share if share else 0.0
            found.append((Chosen(_packed(some), of, answers), share))
        return found

    def _weight(self, packed: PackedBatch, documents: int) -> int:
        """What a mean loss is a mean over: learned tokens, or pairs."""
        return int((packed.targets != IGNORED).sum()) if self.config.learn == "sft" else documents

    def tokens(self, batch: Chosen) -> int:
        return batch.packed.inputs.numel()

    def loss(self, batch: Chosen) -> dict[str, Tensor]:
        config = self.config
        if config.learn == "sft":
            return {"loss": sft_loss(self.model, batch.packed, config.l2wrap, self.start)}
        sums, counts = document_log_probs(self.model, batch.packed, self.start)
        if config.learn == "orpo":
            return orpo_loss(sums, counts, config.preference.weight, batch.answers)
        reference = self.references.of(batch.indices.tolist()).to(sums)
        return dpo_loss(sums, reference, config.preference.beta, config.preference.smoothing)

    def backward(self, batch: Chosen, weight: float) -> dict[str, Tensor]:
        config = self.config
        with self._dropout():
            if not config.piece_length:
                return super().backward(batch, weight)
            through = config.piece_gradient == "through"
            settings = {"through": through, "weight": weight, "l2wrap": config.l2wrap}
            found = backward_documents_in_pieces(self.model, batch.packed, config.piece_length, self.start, **settings)
            return {"loss": found}

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Dropout is a function of the step and its part, so that a resumed run is exact."""
        if not self.config.adapt.dropout:
            yield
            return
        self.part += 1
        with torch.random.fork_rng():
            part = Place.here().rank * self.config.accumulate + self.part
            torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 100_003 + part)
            yield

    def after_step(self) -> None:
        if self.start is not None:
            self.start.project()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, weighted by learned tokens (by pairs for preferences), and the share of pairs preferred."""
        if not self.held_out:
            return {}
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()  # no dropout
        packs = self._packs(self.held_out, seed=0)
        seen, totals, weights = 0, {}, 0
        for step in range(1, len(self.held_out) + 1):
            indices = packs.indices(step)
            some = [self.held_out[i] for i in indices]
            packed = _packed(some)
            here = moved(Chosen(packed, indices + len(self.documents)), next(self.model.parameters()).device)
            found = self.loss(here)
            weight = self._weight(packed, len(some))
            totals = {name: totals.get(name, 0.0) + weight * float(value) for name, value in found.items()}
            weights += weight
            seen += len(some)
            if seen == len(self.held_out):
                break
        for module, training in modes.items():
            module.training = training
        return {f"validation_{name}": total / weights for name, total in totals.items()}

    def export(self, out: Path) -> None:
        """What was trained: model.safetensors, or adapter/ and adapter.pth, or state.safetensors and state.pth."""
        config = self.config
        if self.start is not None:
            save_start(self.start, out / "state.safetensors", self.model)
            if self.start.field == "wkv":  # other programs know no others
                save_start(self.start, out / "state.pth", self.model)
            return
        if config.adapt.method in ADAPTERS:
            save_adapter(self.model, out / "adapter", config.adapt, base=config.base, initial=self.initial)
            if config.adapt.method in IN_RWKV_PEFT:
                save_rwkv_peft(self.model, out / "adapter.pth", config.adapt, initial=self.initial)
            if not config.merge:
                return
            name = fingerprint_of(self.model)
            restore_base(self.model)
            merge(self.model)
            self.model.known_as(name)  # what fingerprints sample of a model, no adapter changes
        name = save_tokenizer(self.tokenizer, self.tokenizer.name, out)
        save_model(self.model, out / "model.safetensors", metadata={"tokenizer": name})


def _split(documents: Sequence[Any], share: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """Documents to learn from and to hold out, these from the end; one alone is learned from."""
    held = min(len(documents) - 1, max(1, round(len(documents) * share))) if share else 0
    return documents[: len(documents) - held], documents[len(documents) - held :]


def _answers(pairs: Iterable[Preference]) -> int:
    """Learned tokens of the answers to prefer."""
    return sum(int(pair.chosen.learned[1:].sum()) for pair in pairs)


def _packed(documents: Sequence[Sample | Preference]) -> PackedBatch:
    return collate_pairs(documents) if isinstance(documents[0], Preference) else collate(documents)


def _length(document: Sample | Preference) -> int:
    if isinstance(document, Preference):
        return _length(document.chosen) + _length(document.rejected)
    return len(document.tokens) - 1
