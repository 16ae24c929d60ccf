"""Where the time of a step goes: bytes, seconds and share of the memory's bandwidth of each part of the native runtime.

Writing one token at batch 1 reads every weight once, so a part is as fast as it can be when it takes no longer than
reading its bytes. The bandwidth is measured in between, by reading as many bytes of ordinary memory.
"""

import re
import statistics
import time
from dataclasses import dataclass

import numpy as np

from rookery.engine.runners.lite import Reads
from rookery.engine.runners.native import NativeRunner

PARTS = (
    ("embedding", r"emb\."),
    ("head", r"head[._]|ln_out\."),
    ("norms and shifts", r".*\.(ln[012]\.|(att|ffn)\.(x_[a-z]$|time_ma?i?[ax]_?[a-z]*$|time_mix_))"),
    ("output", r".*\.att\.output\."),
    (
        "projections",
        r".*\.att\.(receptance|key|value|gate)[12]?\.|.*\.att\.([wavg]1|time_(maa|decay)[a-z_]*_w1|gate_w1)$",
    ),
    ("channel mix", r".*\.(ffn|mlp)\."),
    ("recurrence", r".*\.att\."),
)
"""Part -> names of its tensors; the first match counts."""
ORDER = ("embedding", "norms and shifts", "projections", "recurrence", "output", "channel mix", "head")


@dataclass(frozen=True)
class Part:
    """One part of a step."""

    name: str
    nbytes: int
    """Bytes of weights and state that it moves."""
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Profile:
    """A step of decoding at batch 1."""

    parts: tuple[Part, ...]
    seconds: float
    """Of a whole step, with what lies between the parts."""
    read_bandwidth: float
    """Bytes a second that the same threads read from memory."""
    active: float
    """Share of the channel mixes' hidden units that were not zero."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights and state that a step moves."""
        return sum(part.nbytes for part in self.parts)

    @property
    def share(self) -> float:
        """Share of the bandwidth that a step uses."""
        return self.nbytes / self.seconds / self.read_bandwidth


def part_of(name: str) -> str:
    """The part that reads a tensor."""
    return next(part for part, pattern in PARTS if re.match(pattern, name))


def step_bytes(runner: NativeRunner, active: float, reads: Reads | None = None) -> dict[str, int]:
    """Part -> bytes that a token at batch 1 moves, with this share of the channel mixes' units not zero.

    `reads` says what a compressed model reads; its indices and shadows are not counted.
    """
    total = dict.fromkeys(ORDER, 0)
    for name, nbytes in runner.nbytes.items():
        part = part_of(name)
        if part == "embedding":
            nbytes //= runner.config.vocab_size
        elif name.endswith("ffn.value.weight"):
            nbytes = int(active * nbytes)
        elif reads is not None and name.endswith("ffn.neurons"):
            nbytes = int((reads.units + active) / 2 * nbytes)  # key rows of guessed units, value columns of active ones
        elif reads is not None and name == "head.weight":
            nbytes = int(reads.rows * nbytes)
        total[part] += nbytes
    total["recurrence"] += 2 * runner.init_state().nbytes  # read and written
    return total


def profile(runner: NativeRunner, steps: int = 32, rounds: int = 5) -> Profile:
    """Decodes `rounds` times `steps` tokens after a warm-up, greedily from token 0; medians over the rounds."""
    from rookery import _native

    model, state, token = runner._model, runner.init_state(), [0]

    def decode() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            token[0] = int(runner.forward(token, state)[0].argmax())
        return (time.perf_counter() - start) / steps

    decode()
    before, counts = model.ffn_reads, runner.read_counts()
    decode()
    read, there = (now - then for now, then in zip(model.ffn_reads, before))
    active = read / there if there else 1.0
    nbytes = step_bytes(runner, active, runner.reads_since(counts) if runner.lite else None)
    memory = np.ones(max(1 << 20, sum(nbytes.values())), np.uint8)
    taken: dict[str, list[float]] = {name: [] for name in ORDER}
    whole, reading = [], []
    model.watch(True)
    try:
        for _ in range(rounds):
            start = model.times
            whole.append(decode())
            for name, seconds in model.times.items():
                taken[name].append((seconds - start[name]) / steps)
            begin = time.perf_counter()
            for _ in range(8):
                _native.read_memory(memory, runner.threads)
            reading.append((time.perf_counter() - begin) / 8)
    finally:
        model.watch(False)
    parts = tuple(Part(name, nbytes[name], statistics.median(taken[name])) for name in ORDER)
    return Profile(parts, statistics.median(whole), len(memory) / statistics.median(reading), active)
