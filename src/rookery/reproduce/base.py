"""What a reproduction is: a claim, an experiment made of parts that are kept as they finish, and an outcome.

A file of this package defines

    REPRODUCTION = Reproduction(name="…", claim="…", source="…", experiment=experiment)

where `experiment(work)` gives an `Outcome`. It does its expensive pieces through `work.part(key, compute)`: the result,
plain JSON, is written to the work folder, and the same command goes on with what is there. Sizes are chosen with
`work.size(quick=…, default=…, full=…)`, data is found with `work.data(…)`.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rookery.checkpoints.atomic import replacing
from rookery.data.locate import locate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["quick", "default", "full"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an experiment found."""

    table: list[dict[str, Any]]
    """Rows of equal keys, the baseline's with "baseline": True. A key "x ±" holds the spread of "x"."""
    shown: bool
    """Whether the figures show the claim, by a rule that `findings` states. Never by taste."""
    findings: str
    """Markdown: the rule, what was found, what the experiment leaves open."""
    setup: str
    """Markdown: sizes, data, steps, learning rates: all that is needed to judge the table."""
    seeds: Sequence[int]
    """Two or more."""
    plot: Callable[["Figure"], None]
    """Draws on an empty figure."""
    figure_size: tuple[float, float] = (9.0, 4.0)
    """Inches."""

    def __post_init__(self) -> None:
        assert len(set(self.seeds)) >= 2, "a reproduction needs two seeds or more"
        assert sum(row.get("baseline") is True for row in self.table) >= 1, "the baseline is a row of the table"


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A claim and the experiment that tries it."""

    name: str
    claim: str
    """What the paper says, in one or two sentences of ours."""
    source: str
    """Paper and section."""
    experiment: Callable[["Work"], Outcome]


@dataclass(kw_only=True)
class Work:
    """What an experiment is given: its scale, its data, a folder for what is finished, a voice."""

    scale: Scale
    folder: Path
    """For parts and for the runs inside a part; the same command finds it again."""
    data_folder: Path | None = None
    planned: int = 0
    """Parts that the experiment will ask for, for the estimate of the time left."""
    seconds: float = 0.0
    """Spent on all parts so far, those of earlier calls included."""
    reused: int = 0
    """Parts that earlier calls had finished."""
    _asked: dict[str, Any] = field(default_factory=dict, repr=False)
    _fresh: list[float] = field(default_factory=list, repr=False)

    def size(self, *, quick: T, default: T, full: T) -> T:
        """The value for this scale."""
        return {"quick": quick, "default": default, "full": full}[self.scale]

    def data(self, *names: str) -> list[Path]:
        """Files of the data folder; MissingData names what is not there and where it is published."""
        return locate(*names, folder=self.data_folder)

    def say(self, text: str) -> None:
        """One line to whoever waits."""
        print(text, file=sys.stderr, flush=True)

    def part(self, key: str, compute: Callable[[], T]) -> T:
        """`compute()`, which gives plain JSON data, or what it gave when the same command ran before.

        `key` names the part; what is no letter, digit, '-', '.' or '_' becomes '-' in its file's name.
        """
        if key in self._asked:
            return self._asked[key]
        path = self.folder / "parts" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', key)}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.seconds += kept["seconds"]
            self.reused += 1
            self._asked[key] = kept["result"]
            return kept["result"]
        began = time.perf_counter()
        result = compute()
        took = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"seconds": took, "result": result})
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.seconds += took
        self._fresh.append(took)
        self._asked[key] = json.loads(text)["result"]  # as a later call finds it: lists for tuples, text for numbers
        self._tell(key, took)
        return self._asked[key]

    def _tell(self, key: str, took: float) -> None:
        done = len(self._asked)
        left = max(0, self.planned - done) * sum(self._fresh) / len(self._fresh)
        rest = f", about {left / 60:.1f} min left" if left else ""
        self.say(f"[{done}/{max(self.planned, done)}] {key}: {took:.1f} s{rest}")
