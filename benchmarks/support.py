"""What every benchmark shares: interleaved timing, the machine, the report.

Contenders take turns in one process, so that a slow minute of the machine hits all of them, and the ratios are medians
over the rounds. A benchmark prints its table; `--save` keeps it in benchmarks/results/NAME.json.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
EXTENSIONS = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
"""Instruction sets that explain a processor's figures."""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _extensions() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in EXTENSIONS if flag in flags]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the figures are from."""

    threads: int
    """Threads that the contenders may use."""
    device: str = field(default_factory=_cpu)
    """The processor, or the GPU given by the benchmark."""
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Cores that this process may use."""
    extensions: list[str] = field(default_factory=_extensions)
    """Which of `EXTENSIONS` it has."""
    python: str = field(default_factory=platform.python_version)


@dataclass(frozen=True)
class Seconds:
    """Times of every contender, one a round."""

    rounds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of a typical round."""
        return statistics.median(self.rounds[name])

    def best(self, name: str) -> float:
        """Seconds of the fastest round."""
        return min(self.rounds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """How many times faster `faster` is: the median over the rounds of slower's time by faster's."""
        return statistics.median(a / b for a, b in zip(self.rounds[slower], self.rounds[faster], strict=True))

    def spread(self, slower: str, faster: str) -> tuple[float, float]:
        """The smallest and the largest of these ratios."""
        ratios = [a / b for a, b in zip(self.rounds[slower], self.rounds[faster], strict=True)]
        return min(ratios), max(ratios)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Runs all `calls` in turn, `rounds` times after `warmup` untimed ones. A GPU call waits for what it starts.

    With `clock=time.thread_time` what the calling thread computes is timed, without what others do on its core.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        # rotated, so that nobody always runs in the cache that the same neighbour left
        for name in (names[(turn + i) % len(names)] for i in range(len(names))):
            gc.collect()
            start = clock()
            calls[name]()
            if turn >= 0:
                times[name].append(clock() - start)
    return Seconds(times)


def report(name: str, rows: Sequence[Mapping[str, Any]], machine: Machine, *, save: bool = False) -> None:
    """Prints `rows` as a table under the machine; writes both to benchmarks/results/NAME.json if asked."""
    print(f"{name} on {machine.device}, {machine.threads} of {machine.cores} cores, Python {machine.python}")
    print(f"it has {' '.join(machine.extensions) or 'none of the usual extensions'}")
    flat = [_flatten(row) for row in rows]
    heads = list(dict.fromkeys(key for row in flat for key in row))
    table = [heads, *([_cell(row.get(head, "")) for head in heads] for row in flat)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if save:
        RESULTS.mkdir(exist_ok=True)
        content = {"benchmark": name, "machine": asdict(machine), "rows": [dict(row) for row in rows]}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flatten(value, f"{prefix}{key} ") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def peak_mb() -> float:
    """MB that this process held at most. Unlike what getrusage tells, not those of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
