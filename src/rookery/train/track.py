"""What a run tells: metrics.jsonl for machines, a progress bar or plain lines for people."""

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rookery.errors import MissingDependency

LINE_EVERY = 10.0
"""Seconds between plain lines where there is no terminal to draw a bar on."""


class Metrics:
    """metrics.jsonl: one flushed line a step. Opening it drops lines after the step that a run resumes from."""

    def __init__(self, path: Path, resume_step: int, track: str = "") -> None:
        """`track` names other places to write to, see `TrainConfig.track`."""
        self._sinks = [sink(name.strip(), path.parent) for name in track.split(",") if name.strip()]
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
        # JSON knows no NaN
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        for write, _ in self._sinks:
            write(row["step"], {k: v for k, v in row.items() if k != "step"})

    def close(self) -> None:
        self._file.close()
        for _, close in self._sinks:
            close()


Sink = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""What writes the values of a step, and what ends it."""


def sink(name: str, out: Path) -> Sink:
    """A place to write metrics to, by name. MissingDependency where its library is not installed."""
    modules = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
    if name not in modules:
        raise ValueError(f"track knows {', '.join(modules)}; got {name!r}")
    try:
        module = importlib.import_module(modules[name])
    except ImportError:
        raise MissingDependency(f"track={name!r} needs its library: pip install {name}") from None
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    module.init(project="rookery", name=out.name, **({"dir": str(out)} if name == "wandb" else {}))
    return (lambda step, values: module.log(values, step=step)), module.finish


class Silent:
    """In place of Metrics and Console in all processes but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, **row: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, *_: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass


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
