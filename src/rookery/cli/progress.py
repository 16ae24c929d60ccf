"""How far something long is: a line that is written over at a terminal, a plain line now and then elsewhere."""

import sys
import time

PLAIN = 10.0
"""Seconds between plain lines; what takes less says nothing."""


class Progress:
    """Share, rate and time left of so many `unit`s, each `scale` of what is counted; on stderr."""

    def __init__(self, unit: str, scale: float = 1) -> None:
        self.unit, self.scale = unit, scale
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.perf_counter()
        self.begun: float | None = None

    def __call__(self, done: float, total: float, note: str = "") -> None:
        now = time.perf_counter()
        if self.begun is None:
            self.begun = done  # what an earlier run has done says nothing about the rate
        if now - self.shown < (0.1 if self.terminal else PLAIN) and (done < total or not self.terminal):
            return
        self.shown = now
        rate = (done - self.begun) / max(now - self.started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        digits = 0 if self.scale == 1 else 1
        counts = f"{done / self.scale:,.{digits}f} of {total / self.scale:,.{digits}f}"
        share = f"{counts} {self.unit}, {100 * done / max(total, 1):.0f}%"
        print(self._line(f"{share}{note}{left}"), end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def _line(self, text: str) -> str:
        return f"\r\x1b[K{text}" if self.terminal else text

    def close(self) -> None:
        """Takes the line away."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
