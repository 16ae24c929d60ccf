"""The `rwkv` package's RWKV, PIPELINE and PIPELINE_ARGS (version 0.8) on this library: change one import.

    from rookery.compat.rwkv import RWKV, PIPELINE, PIPELINE_ARGS

`out, state = model.forward(tokens, state)` gives and takes state lists in that package's layouts. Differences: a list
that is given is never changed, the environment (RWKV_V7_ON, RWKV_CUDA_ON …) is not read, and a model runs on one
device. With torch installed logits and states are torch tensors, without it NumPy arrays.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.compat.rwkv_state import check_family, from_list, to_list
from rookery.engine.runners.native import NativeRunner
from rookery.engine.sampling import Sampler, Sampling, distribution, draw
from rookery.errors import BackendUnavailable, BadCheckpoint
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import load_tokenizer

log = logging.getLogger("rookery")

TYPES = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
PACKED = {"i8": "int8", "i4": "int4", "i3": "int4"}
PART = re.compile(r"(cuda(?::\d+)?|cpu|mps|dml) (fp16|fp32|bf16)(i8|i4|i3)?(?: \*(\d+)(\+)?)?")
WORLD = "rwkv_vocab_v20230424"


@dataclass(frozen=True)
class Plan:
    """What a strategy string comes to here."""

    device: str
    dtype: str
    quantize: str | None = None
    """Packed weights, on the CPU."""
    remarks: tuple[str, ...] = ()
    """In what the string is not followed to the letter."""


def explain(strategy: str) -> Plan:
    """How a strategy ("cuda fp16", "cuda fp16i8 *10 -> cpu fp32") is run; ValueError for what is none."""
    parts = [PART.fullmatch(" ".join(part.split())) for part in strategy.split("->")]
    if not all(parts):
        raise ValueError(
            f"{strategy!r} is no strategy; they look like 'cpu fp32', 'cuda fp16' or 'cuda:0 bf16 *10 -> cpu fp32'"
        )
    device, kind = parts[0].group(1, 2)
    if device == "dml":
        raise ValueError(f"{strategy!r} asks for DirectML, which is not supported; use 'cpu fp32' or 'cuda fp16'")
    remarks = []
    if len({part.group(1, 2) for part in parts}) > 1:
        remarks.append(f"a model runs on one device: all layers go to {device} as {kind}")
    if any(part[5] for part in parts):
        remarks.append("layers are not streamed")
    packed = next((PACKED[part[3]] for part in parts if part[3]), None)
    if packed and device != "cpu":
        remarks.append(f"weights stay {kind} on {device}; only the CPU has smaller ones")
        packed = None
    return Plan(device, TYPES[kind], packed, tuple(remarks))


class RWKV:
    """A model file of any readable format, called as the `rwkv` package calls its models.

    `model` is a path (".pth" may be left out) or Hub id, `strategy` as in that package: on the CPU the compiled runtime
    runs what it knows, torch the rest and all other devices. Raises BadCheckpoint, ValueError for a strategy that is
    none, BackendUnavailable or MissingDependency for what cannot run here.
    """

    def __init__(
        self, model: str, strategy: str, verbose: bool = True, convert_and_save_and_exit: str | None = None
    ) -> None:
        plan = explain(strategy)
        if convert_and_save_and_exit is not None:
            raise ValueError(
                "files need no conversion for a strategy here; for another format or precision use `rookery convert`"
            )
        path = os.fspath(model).strip()
        if not os.path.exists(path) and os.path.exists(path + ".pth"):
            path += ".pth"
        checkpoint = open_checkpoint(path)
        if checkpoint.family.kind != "language":
            raise BadCheckpoint(f"{path!r} is a model of kind {checkpoint.family.kind!r}, not a language model")
        check_family(checkpoint.family.name)
        if verbose:
            for remark in plan.remarks:
                log.warning("strategy %r: %s", strategy, remark)
        self.runner = _runner(checkpoint, plan)
        self.args = _args(path, strategy, checkpoint.config)
        self.version = _version(checkpoint.family.name, checkpoint.config)
        self._start = _start(checkpoint, self.runner)

    def forward(
        self, tokens: int | Sequence[int], state: list | None, full_output: bool = False
    ) -> tuple[Any, list[Any]]:
        """Logits of the last token [vocab], or of all with `full_output` [tokens, vocab], and the state after them."""
        ids = [int(tokens)] if np.ndim(tokens) == 0 else [int(token) for token in tokens]
        if not ids:
            raise ValueError("forward needs at least one token")
        row = self.row(state)
        logits = self.runner.forward(ids, row, "all" if full_output and len(ids) > 1 else "last")
        return _tensor(logits if len(logits) > 1 else logits[0]), to_list(row, self.runner)

    __call__ = forward

    def generate_zero_state(self) -> list[Any]:
        """The state before the first token: zeros, or the tuned state that the file carries."""
        return to_list(self.row(None), self.runner)

    def row(self, state: list | None) -> Any:
        """The engine's state for a state list."""
        if state is None:
            return self.runner.init_state(self._start)
        return from_list(state, self.runner)

    def eval(self) -> RWKV:
        """Itself: there is no other mode."""
        return self


@dataclass
class PIPELINE_ARGS:
    """How PIPELINE.generate chooses tokens; names and defaults are the `rwkv` package's."""

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    alpha_frequency: float = 0.2
    """Taken off a token's logit once for each occurrence."""
    alpha_presence: float = 0.2
    """Taken off the logit of every token that has occurred."""
    alpha_decay: float = 0.996
    """Old occurrences count this much less with every token."""
    token_ban: Sequence[int] = field(default_factory=list)
    """Never chosen."""
    token_stop: Sequence[int] = field(default_factory=list)
    """End the text and are not part of it."""
    chunk_len: int = 256
    """Tokens of the prompt that are read at once."""


class PIPELINE:
    """Text in and out. `WORD_NAME` is "rwkv_vocab_v20230424" or the path of a tokenizer.json."""

    def __init__(self, model: RWKV, WORD_NAME: str | Tokenizer) -> None:
        self.model = model
        self.tokenizer = _tokenizer(WORD_NAME)

    def refine_context(self, context: str) -> str:
        """The lines of a text without blank ones and without space around them, a line end in front."""
        lines = [line.strip().strip("\u3000").strip("\r") for line in context.strip().split("\n")]
        return "\n" + "\n".join(line for line in lines if line).strip()

    def encode(self, x: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(x)

    def decode(self, x: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(x))

    def sample_logits(self, logits: Any, temperature: float = 1.0, top_p: float = 0.85, top_k: int = 0) -> int:
        """A token for logits [vocab]; draws one number from `np.random`, so that `np.random.seed` repeats it."""
        sampling = Sampling(temperature=temperature, top_p=min(max(top_p, 0), 1), top_k=int(top_k))
        tokens, probabilities = distribution(_array(logits), sampling)
        return int(tokens[draw(probabilities, np.random.random_sample())])

    def generate(
        self,
        ctx: str,
        token_count: int = 100,
        args: PIPELINE_ARGS | Any = None,
        callback: Callable[[str], Any] | None = None,
        state: list | None = None,
    ) -> str:
        """The text that follows `ctx`, of at most `token_count` tokens; `callback` gets each piece as it is made."""
        args = args or PIPELINE_ARGS()
        runner, row, tokens = self.model.runner, self.model.row(state), self.encode(ctx)
        if not tokens:
            raise ValueError("there is nothing to go on from: ctx holds no token")
        sampler = Sampler(_sampling(args), 0, self.tokenizer.token_bytes)
        decoder, pieces = self.tokenizer.stream(), []
        step = max(1, args.chunk_len)
        for _ in range(token_count):
            for start in range(0, len(tokens), step):
                logits = runner.forward(tokens[start : start + step], row, "last")
            token = sampler.next(logits[-1], np.random.random_sample())
            if token in args.token_stop:
                break
            sampler.accept(token)
            tokens = [token]
            if piece := decoder.push(token):
                pieces.append(piece)
                if callback:
                    callback(piece)
        return "".join(pieces)


def _runner(checkpoint: Any, plan: Plan) -> Any:
    if plan.device == "cpu":
        try:
            if plan.quantize:
                return NativeRunner(checkpoint, quantize=plan.quantize)
            return NativeRunner(checkpoint, dtype=plan.dtype)
        except BackendUnavailable as reason:
            if plan.quantize:
                raise
            log.info("%s; torch runs it", reason)
    try:
        import torch

        from rookery.engine.runners.torch import TorchRunner
        from rookery.models import load
    except ImportError as error:
        from rookery.errors import MissingDependency

        raise MissingDependency(f'{checkpoint.path!r} needs torch ({error}); pip install "rookery[torch]"') from None
    try:
        torch.empty(0, device=plan.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the strategy's {plan.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return TorchRunner(load(checkpoint, device=plan.device, dtype=getattr(torch, plan.dtype)))


def _start(checkpoint: Any, runner: Any) -> dict[str, np.ndarray] | None:
    from rookery.checkpoints.tuned_state import tuned_state_of

    tuned, fresh = tuned_state_of(checkpoint), runner.init_state().tensors()
    names = {"family": runner.family, "config": runner.config, "model": runner.fingerprint()}
    return None if tuned is None else tuned.onto(fresh, **names)


def _args(path: str, strategy: str, config: Any) -> SimpleNamespace:
    heads = getattr(config, "num_heads", 1)
    return SimpleNamespace(
        MODEL_NAME=path,
        strategy_string=strategy,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_att=config.hidden_size,
        n_ffn=config.intermediate_size,
        n_head=heads,
        head_size=config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def _version(family: str, config: Any) -> float:
    """4, 5, 5.1, 5.2, 6.0 or 7.0, as that package counts."""
    if family == "rwkv5":
        return 5.2 if config.decay == "channel" else 5.1 if config.has_gate else 5
    return {"rwkv4": 4, "rwkv6": 6.0}.get(family, 7.0)


def _sampling(args: Any) -> Sampling:
    return Sampling(
        temperature=args.temperature,
        top_p=min(max(args.top_p, 0), 1),
        top_k=int(args.top_k),
        presence_penalty=args.alpha_presence,
        frequency_penalty=args.alpha_frequency,
        penalty_decay=args.alpha_decay,
        banned=tuple(args.token_ban),
    )


def _tokenizer(name: str | Tokenizer) -> Tokenizer:
    if not isinstance(name, str | os.PathLike):
        return name
    if os.fspath(name) == WORLD:
        return load_tokenizer("world")
    if not os.path.exists(name) and os.path.basename(name) == "20B_tokenizer.json":
        return load_tokenizer("20b")
    return load_tokenizer(name)


def _tensor(array: np.ndarray) -> Any:
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(np.ascontiguousarray(array))


def _array(logits: Any) -> np.ndarray:
    return np.asarray(logits.detach().float().cpu() if hasattr(logits, "detach") else logits, np.float32)
