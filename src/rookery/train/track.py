"""What a run tells: metrics.jsonl for machines, a progress bar or plain lines for people."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

LINE_EVERY = 10.0
"""Seconds between plain lines where there is no terminal to draw a bar on."""


class Metrics:
    """metrics.jsonl: one flushed line a step. Opening it drops lines after the step that a run resumes from."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a line cut off by a crash
                    break
                if row["step"] > resume_step:
                    break
                kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Console:
    """A progress bar with rate and time left on a terminal, a line now and then elsewhere; all on stderr."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done = steps, done
        self._bar = None
        self._last_line = 0.0
        if sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=RichConsole(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > LINE_EVERY or step == self.steps:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.steps}  {text}  {seconds_left / 60:.1f} min left")

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
