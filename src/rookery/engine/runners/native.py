"""Runs a model with the compiled runtime: on the CPU, without torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from rookery.checkpoints.adapter import Adapter, digest_of, fingerprint_with
from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.pack import FORMATS, for_runtime, plan
from rookery.engine.runners.lite import Reads, file_tensors, guessing
from rookery.engine.runners.pages import in_large_pages
from rookery.engine.runners.protocol import Wanted, asked, check_rows, select
from rookery.errors import BackendUnavailable, BadCheckpoint, BadState, UnknownName
from rookery.families.base import Recurrent

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
"""Types of weights that the runtime computes with. Sums are float32 for all of them; where the processor multiplies
pairs of bfloat16 numbers, what is multiplied with bfloat16 matrices is rounded to bfloat16, too."""
FAMILIES = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
"""Families that the runtime knows."""

SMALL = 64 << 20
"""Bytes of weights below which cores would wait for each other longer than they read; on a busy machine, ten times."""


class NativeRowState:
    """One sequence's state: all its numbers in one float32 array, in the runtime's order."""

    def __init__(self, config: Recurrent, numbers: np.ndarray, tokens_seen: int = 0, adapter: Any = None) -> None:
        self.config, self.numbers, self.tokens_seen, self.adapter = config, numbers, tokens_seen, adapter

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers in it."""
        return self.numbers.nbytes

    def copy(self) -> NativeRowState:
        """An independent copy."""
        numbers = _aligned(len(self.numbers))
        numbers[:] = self.numbers
        return NativeRowState(self.config, numbers, self.tokens_seen, self.adapter)

    def tensors(self) -> dict[str, np.ndarray]:
        """Copies of all tensors under their names in state files, each [1, …], with "tokens_seen" int64 [1]."""
        named = {name: np.ascontiguousarray(view)[None] for name, view in self.views().items()}
        return named | {"tokens_seen": np.array([self.tokens_seen])}

    def views(self) -> dict[str, np.ndarray]:
        """The tensors by name without the first axis; writing to them changes the state."""
        width, named = self.config.hidden_size, {}
        for i, layer in enumerate(self.numbers.reshape(self.config.num_hidden_layers, -1)):
            wkv = layer[width:-width].reshape(self.config.wkv_shape)
            named[f"layers.{i}.att_shift"] = layer[:width]
            named[f"layers.{i}.wkv"] = wkv if wkv.ndim == 2 else wkv.swapaxes(1, 2)  # the kernels keep [key, value]
            named[f"layers.{i}.ffn_shift"] = layer[-width:]
        return named


class NativeRunner:
    """A model file behind the engine's protocol.

    `threads` (all cores, or one for a small model), `isa` ("avx2", …; the best that this machine has) and `dtype`
    ("float32", "bfloat16", "float16"; that of the file) may be chosen. Weights of the file that can be used as they are
    stay in the mapped file. `quantize` ("int8", "int4") packs the large matrices, those of the file that have no more
    bits already being left as they are. `lean` keeps a compressed model's pages out of memory: what a token needs is
    copied from the file, which is slower. `preload` copies the weights into large pages of memory instead of mapping
    them, unless they are compressed or take more than half of the machine's memory: it starts later and then runs
    faster, with the same bits. Logits do not depend on `threads`, nor on how tokens are cut into calls and
    batches.
    Raises BackendUnavailable for a family that the runtime does not know, UnknownName for another `isa` or `dtype`.
    """

    name = "native"

    def __init__(
        self,
        checkpoint: Checkpoint | str | os.PathLike[str],
        *,
        threads: int | None = None,
        isa: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        lean: bool = False,
        preload: bool = False,
    ) -> None:
        try:
            from rookery import _native
        except ImportError as error:
            raise BackendUnavailable(
                f"the compiled runtime is missing ({error}); reinstall rookery on a machine with a C++20 compiler, or "
                'run the model with torch (device="cpu")'
            ) from None
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        if checkpoint.family.name not in FAMILIES:
            raise BackendUnavailable(
                f"the compiled runtime runs {', '.join(FAMILIES)}, {checkpoint.path!r} is a model of the family "
                f'{checkpoint.family.name}; run it with torch (device="cpu")'
            )
        if checkpoint.family.name == "rwkv7" and checkpoint.config.head_dim % 16:
            raise BackendUnavailable(
                f"{checkpoint.path!r} has heads of {checkpoint.config.head_dim} channels, the compiled runtime runs "
                'RWKV-7 whose heads are a multiple of 16; run it with torch (device="cpu")'
            )
        if dtype is not None and dtype not in DTYPES:
            raise UnknownName(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if quantize is not None and (quantize not in FORMATS or dtype is not None):
            raise UnknownName(f"quantize {quantize!r} is not one of {', '.join(FORMATS)}, without a dtype")
        if isa is not None and isa not in [*_native.available_isas(), *_native.imitated_isas()]:
            raise UnknownName(f"isa {isa!r} is not one of this machine's: {', '.join(_native.available_isas())}")
        self.family = checkpoint.family.name
        self.config: Any = checkpoint.config
        self._fingerprint = checkpoint.fingerprint
        self.adapter: Any = None
        """What is beside the weights for states that this runner makes: a `_native.Adapter`."""
        self._base: NativeRunner | None = None
        self.lite = bool(checkpoint.lite)
        """Whether the model is a compressed one (RWKV-Lite)."""
        if self.lite and quantize is not None:
            raise BadCheckpoint(
                f"{checkpoint.path!r} is compressed and cannot be quantised on the way; compress the original with int8"
            )
        tensors, packed = _tensors(checkpoint, DTYPES[dtype] if dtype else None, quantize)
        if lean and not self.lite:
            raise BadCheckpoint(
                f"{checkpoint.path!r} is not compressed, and lean is for models that are; compress it first"
            )
        lite = guessing(checkpoint, lean) if self.lite else {}
        self.formats = {name: packed[name][0] if name in packed else _name(tensor) for name, tensor in tensors.items()}
        """Official tensor name -> format of its weights."""
        self.nbytes = {name: tensor.nbytes for name, tensor in tensors.items()}
        """Official tensor name -> bytes of its weights."""
        small = sum(self.nbytes.values()) < SMALL
        self.threads = threads or (1 if small else _native.available_cores())
        fits = 2 * sum(self.nbytes.values()) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if preload and fits and not self.lite:  # of a compressed model most is not needed
            # the embedding is looked up, a row a token; columns of the channel mix are copied by the runtime
            left = {"emb.weight"} | {name for name in tensors if name.endswith("ffn.value.weight")} - packed.keys()
            read = {name: tensor for name, tensor in tensors.items() if name not in left}
            tensors = tensors | in_large_pages(read, self.threads)
        try:
            told = (packed, lite) if lite else (packed,)
            self._model = _native.Model(self.family, asdict(self.config), tensors, isa or "", self.threads, *told)
        except ValueError as wrong:
            if not self.lite:
                raise
            raise BadCheckpoint(f"{checkpoint.path!r}: {wrong}; compress the original again") from None

    def read_counts(self) -> dict[str, int]:
        """What the runtime read of a compressed model so far; two of these make `Reads`."""
        return self._model.lite_counts

    def reads_since(self, before: Mapping[str, int]) -> Reads:
        """What was read since `read_counts` gave `before`."""
        return Reads.between(before, self.read_counts(), self.config.vocab_size)

    def adapted(self, adapter: Adapter) -> NativeRunner:
        """The same weights with the factors of a LoRA, PiSSA, MiSS or mini beside them, in float32; see `Runner`."""
        if self.lite:
            raise BackendUnavailable(
                f"{adapter.path!r} cannot be put beside a compressed model: its matrices are not those that the "
                "adapter was trained on; merge it into the original and compress that"
            )
        from rookery import _native
        from rookery.checkpoints.swapped import low_rank_pairs

        shapes = {name.removesuffix(".weight"): shape for name, shape in self._model.matrices.items()}
        pairs = low_rank_pairs(adapter, shapes, self.family)
        factors = {f"{module}.weight": tuple(map(_floats, (a, b.T))) for module, (a, b) in pairs.items()}
        runner = copy.copy(self)
        runner._base, runner.adapter = self.base, _native.Adapter(self._model, factors)
        runner._fingerprint = partial(fingerprint_with, self.base.fingerprint(), digest_of(adapter))
        return runner

    @property
    def base(self) -> NativeRunner:
        """The runner itself, or the one that `adapted` was called of first."""
        return self._base or self

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._model.isa

    def fingerprint(self) -> str:
        """Names these weights in state files."""
        return self._fingerprint()

    def init_state(self, tensors: Mapping[str, np.ndarray] | None = None) -> NativeRowState:
        """The state before the first token, or the one that `RowState.tensors` gave; BadState where it does not fit."""
        state = self._blank(0, self.adapter)
        if tensors is None:
            self._model.begin(state.numbers)
            return state
        views = state.views()
        if any(name.endswith(".kstate") for name in tensors):
            raise BackendUnavailable(
                "the compiled runtime hosts no kernel-upscaled states; run the model with torch "
                '(--device cpu, or device="cpu")'
            )
        if tensors.keys() != {*views, "tokens_seen"}:
            raise BadState(
                f"the state holds {sorted(tensors)}, this model's state is {sorted([*views, 'tokens_seen'])}"
            )
        for name, view in views.items():
            if tensors[name].shape != (1, *view.shape):
                raise BadState(
                    f"{name} has shape {list(tensors[name].shape)}, one row of this model's state {[1, *view.shape]}"
                )
            view[:] = tensors[name][0]
        state.tokens_seen = int(tensors["tokens_seen"][0])
        return state

    def forward(self, tokens: Sequence[int], state: NativeRowState, logits: Wanted = "last") -> np.ndarray:
        """Reads tokens, advancing `state`; float32 logits [n, vocab] of the last places. The array is the caller's."""
        ids = _token_ids(tokens, self.config.vocab_size)
        first = len(ids) - asked(logits, len(ids))
        return self._run(ids, [state], [len(ids)], np.arange(first, len(ids), dtype=np.int32))

    def forward_batch(self, tokens: Sequence[int], states: Sequence[NativeRowState]) -> np.ndarray:
        """Reads one token in each state, advancing all of them; float32 logits [rows, vocab]."""
        ids = _token_ids(tokens, self.config.vocab_size)
        if len(ids) != len(states):
            raise ValueError(f"{len(ids)} tokens for {len(states)} states; give one token for each state")
        if len({id(state) for state in states}) < len(states):
            raise ValueError("a state is in the batch twice; copy it first")
        return self._run(ids, list(states), [1] * len(ids), np.arange(len(ids), dtype=np.int32))

    def forward_rows(
        self, rows: Sequence[Sequence[int]], states: Sequence[NativeRowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray]:
        """As `forward` for several rows at once, each with a state of its own; the weights are read once."""
        if not rows:
            return []
        ids = [_token_ids(row, self.config.vocab_size) for row in rows]
        check_rows(ids, states, logits)
        if len({id(state.adapter) for state in states}) > 1:  # neighbours with one adapter read it together
            order = sorted(range(len(rows)), key=lambda row: id(states[row].adapter))
            ids, states, logits = ([given[row] for row in order] for given in (ids, states, logits))
            found = dict(zip(order, self._rows(ids, states, logits)))
            return [found[row] for row in range(len(rows))]
        return self._rows(ids, states, logits)

    def _rows(
        self, ids: Sequence[np.ndarray], states: Sequence[NativeRowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray]:
        ends = np.cumsum([len(row) for row in ids])
        counts = [asked(how, len(row)) for row, how in zip(ids, logits)]
        wanted = np.concatenate([np.arange(end - count, end, dtype=np.int32) for end, count in zip(ends, counts)])
        together = self._run(np.concatenate(ids), list(states), [len(row) for row in ids], wanted)
        return np.split(together, np.cumsum(counts)[:-1])

    def forward_steps(
        self, tokens: Sequence[int], state: NativeRowState, steps: int
    ) -> tuple[np.ndarray, list[NativeRowState]]:
        """As `forward`, for the last `steps` + 1 places: their logits, and the states before the later ones.

        The first state of the list is the one after all tokens but the last `steps`, the last one that after all.
        `state` stays as it is.
        """
        ids = _token_ids(tokens, self.config.vocab_size)
        if not 0 <= steps < len(ids):
            raise ValueError(f"steps must lie between 0 and {len(ids) - 1} for {len(ids)} tokens, got {steps}")
        first = len(ids) - steps
        states = [state.copy(), *(self._blank(state.tokens_seen, state.adapter) for _ in range(steps))]
        wanted = np.arange(first - 1, len(ids), dtype=np.int32)
        return self._run(ids, states, [first, *[1] * steps], wanted, chained=True), states

    def _blank(self, tokens_seen: int, adapter: Any) -> NativeRowState:
        return NativeRowState(self.config, _aligned(self._model.state_size), tokens_seen, adapter)

    def select(self, states: Sequence[NativeRowState], rows: Sequence[int]) -> list[NativeRowState]:
        """States by index, in any order and number; one that is chosen once is not copied."""
        return select(states, rows)

    def _run(
        self,
        ids: np.ndarray,
        states: list[NativeRowState],
        lengths: list[int],
        wanted: np.ndarray,
        chained: bool = False,
    ) -> np.ndarray:
        logits = np.empty((len(wanted), self.config.vocab_size), np.float32)
        adapters = [state.adapter for state in states]
        numbers = [state.numbers for state in states]
        self._model.forward(ids, numbers, lengths, wanted, logits, self.threads, chained, adapters)
        for state, length in zip(states, np.cumsum(lengths).tolist() if chained else lengths):
            state.tokens_seen += length
        return logits


def _token_ids(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """int32 ids; ValueError names the first that is no token of the model."""
    ids = np.asarray(tokens if len(tokens) else [], np.int64)
    if ids.ndim != 1:
        raise ValueError(f"tokens must be one row of ids, got shape {list(ids.shape)}")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"token id {wrong} is not in the model's vocabulary of {vocab_size}; "
            "check that the tokenizer is the model's own"
        )
    return ids.astype(np.int32)


def _tensors(
    checkpoint: Checkpoint, dtype: np.dtype | None, quantize: str | None
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str, int, int]]]:
    """All tensors as the runtime takes them, and how those of them lie that are packed."""
    wanted = plan(checkpoint, quantize) if quantize else {}
    stored = file_tensors(checkpoint) if checkpoint.lite else checkpoint.tensors
    tensors: dict[str, np.ndarray] = {}
    packed: dict[str, tuple[str, str, int, int]] = {}
    for name, tensor in stored.items():
        if dtype is None and (matrix := for_runtime(name, tensor, wanted.get(name))):
            tensors[name], packed[name] = matrix[0], (*matrix[1:], *tensor.shape)
        else:
            tensors[name] = _usable(tensor.read(), dtype)
    return tensors, packed


def _name(tensor: np.ndarray) -> str:
    return "bfloat16" if tensor.dtype == np.uint16 else tensor.dtype.name


def _usable(tensor: np.ndarray, wanted: np.dtype | None) -> np.ndarray:
    """The tensor in a type that the runtime computes with, bfloat16 as uint16; untouched wherever possible."""
    dtype = wanted or (tensor.dtype if tensor.dtype in DTYPES.values() else np.dtype(np.float32))
    tensor = np.ascontiguousarray(tensor, dtype)
    return tensor.view(np.uint16) if dtype == BFLOAT16 else tensor


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _aligned(count: int) -> np.ndarray:
    """An uninitialised float32 array that starts at a cache line."""
    memory = np.empty(4 * count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * count].view(np.float32)
