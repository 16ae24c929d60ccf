"""The three files of a reproduction, NAME.md, NAME.png and NAME.json, and the page that lists them."""

import json
import math
import os
import platform
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rookery.checkpoints.atomic import replacing
from rookery.plotting import new_figure, require_matplotlib
from rookery.reproduce import reproduction
from rookery.reproduce.base import Outcome, Reproduction, Scale, Work

PIXELS_PER_INCH = 110
SPREAD = " ±"
"""Ends the key of a spread: "loss ±" belongs to "loss"."""


def run(name: str, *, scale: Scale = "default", data: str | Path | None = None, out: str | Path) -> Path:
    """Runs the reproduction `name` and writes its three files to `out`; gives the path of NAME.json.

    What is finished is kept in `out`/.work/NAME-SCALE: an interrupted run goes on when it is called again, a finished
    one only draws its files anew. Delete that folder to begin afresh.
    """
    tried, out = reproduction(name), Path(out)
    work = Work(scale=scale, folder=out / ".work" / f"{name}-{scale}", data_folder=Path(data) if data else None)
    work.folder.mkdir(parents=True, exist_ok=True)
    require_matplotlib()  # before the work, not after it
    outcome = tried.experiment(work)
    if work.reused:
        work.say(f"{work.reused} parts were there already; to make them again, delete {work.folder}")
    return write(tried, outcome, work, out)


def write(tried: Reproduction, outcome: Outcome, work: Work, out: Path) -> Path:
    """Writes plot, page and, last, the record; then the list of all records in `out`."""
    flag = "" if work.scale == "default" else f" --{work.scale}"
    record = {
        "name": tried.name,
        "claim": tried.claim,
        "source": tried.source,
        "verdict": "shown" if outcome.shown else "not shown",
        "scale": work.scale,
        "seeds": list(outcome.seeds),
        "table": [_plain(row) for row in outcome.table],
        "seconds": round(work.seconds, 1),
        "command": f"rookery reproduce {tried.name}{flag}",
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = out / f"{tried.name}.json"
    with replacing(out / f"{tried.name}.png") as temporary:
        _draw(outcome, temporary)
    with replacing(out / f"{tried.name}.md") as temporary:
        temporary.write_text(page(record, outcome), encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(out / "index.md") as temporary:
        temporary.write_text(index(out), encoding="utf-8")
    return path


def _draw(outcome: Outcome, path: Path) -> None:
    figure = new_figure(*outcome.figure_size)
    outcome.plot(figure)
    figure.savefig(path, dpi=PIXELS_PER_INCH, format="png", metadata={"Software": None})


def page(record: Mapping[str, Any], outcome: Outcome) -> str:
    """The Markdown page of one reproduction."""
    name = record["name"]
    note = ""
    if record["scale"] == "quick":
        note = (
            "\n!!! warning\n    Made with `--quick`, which only shows that everything runs: the figures mean nothing.\n"
        )
    return f"""# {name}

**Claim.** {record["claim"]} ({record["source"]})

**Verdict: {record["verdict"]} at this scale.**
{note}
{reflow(outcome.findings)}

![plot of {name}]({name}.png)

{markdown_table(record["table"])}

The baseline's row is marked with *. A figure after ± is half the range over the seeds
{", ".join(map(str, record["seeds"]))}.

## How it was run

{reflow(outcome.setup)}

Made by `{record["command"]}` in {duration(record["seconds"])} on {record["machine"]}, {record["date"]}.
The figures are also in [{name}.json]({name}.json).
"""


def reflow(text: str, width: int = 120) -> str:
    """Markdown with its paragraphs wrapped anew; lists, tables, quotes and indented blocks stay as they are."""
    blocks = text.strip().split("\n\n")
    kept = re.compile(r"[-*|>!#` ]|\d+\. ")
    return "\n\n".join(
        block if kept.match(block) else textwrap.fill(block, width, break_long_words=False, break_on_hyphens=False)
        for block in blocks
    )


def index(out: Path) -> str:
    """The page that lists every record in `out`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    rows = [f"| [{r['name']}]({r['name']}.md) | {r['claim']} | {r['verdict']} |" for r in records]
    lines = "\n".join(rows)
    return f"""# Reproductions

What papers about RWKV and its relatives claim, tried at the size of one machine, each with its baseline, two seeds or
more, and a rule for the verdict that was fixed in the code. "Not shown" means just that: not at this size, with this
much training. `rookery reproduce NAME` runs any of them again; [how](../how-to/reproduce.md).

| name | claim | verdict at our scale |
|---|---|---|
{lines}
"""


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table: spreads beside their means, the baseline marked."""
    heads = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "baseline"]
    heads = [head for head in heads if not head.endswith(SPREAD)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [cell(row.get(head)) + _spread(row.get(head + SPREAD)) for head in heads]
        cells[0] += " *" if row.get("baseline") else ""
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {cell(value)}"


def cell(value: Any) -> str:
    """A value as people read it: thousands apart, small numbers with three or four digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def mean_spread(name: str, values: Iterable[float]) -> dict[str, float]:
    """The mean of the seeds' values under `name`, and half their range under `name` ±."""
    values = list(values)
    return {name: statistics.fmean(values), name + SPREAD: (max(values) - min(values)) / 2}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN; six digits are more than any of these experiments resolves
    return {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}


def duration(seconds: float) -> str:
    """Seconds or minutes, whichever reads better."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()} ({cores} cores)"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
