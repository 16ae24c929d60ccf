"""Fills docs/how-it-works/training-speed.md from what the training benchmarks kept in benchmarks/results.

    python benchmarks/training_page.py

`make bench-train` ends with it. What stands between `<!-- NAME -->` and `<!-- end -->` is replaced where
benchmarks/results/NAME.json is there, and left as it is where it is not.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "how-it-works" / "training-speed.md"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    found = {name: json.loads(path.read_text()) for name in BLOCKS if (path := RESULTS / f"{name}.json").is_file()}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{PAGE.name}: {', '.join(found) or 'nothing'} filled in")


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with the blocks of `results`, benchmark's name -> content of its file, put in."""

    def block(found: re.Match[str]) -> str:
        name = found[2]
        return f"{found[1]}{BLOCKS[name](results[name])}\n{found[3]}" if name in results else found[0]

    return BLOCK.sub(block, page)


def machine(results: Mapping[str, Any]) -> str:
    told = results["machine"]
    threads = told["threads"]
    cores = "one core" if threads == 1 else f"{threads} cores"
    return f"{cores} of {told['device']} ({', '.join(told['extensions'])})"


def gpt(results: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['dtype']}, rows of {row['length']:,} tokens",
            f"{row['tokens_per_second']['rwkv7']:,.0f}",
            f"{row['tokens_per_second']['gpt']:,.0f}",
            f"{row['rwkv7_over_gpt']:.2f}",
        )
        for row in results["rows"]
    ]
    naive = next((row for row in results["rows"] if row.get("rwkv7_over_naive")), None)
    said = ""
    if naive:
        said = (
            f"\nWith {naive['dtype']} and rows of {naive['length']:,} tokens the same RWKV-7 on the references of its "
            f"operators\nread {naive['tokens_per_second']['naive']:,.0f} tokens a second: the kernels are "
            f"{naive['rwkv7_over_naive']:.1f} times as fast for the whole step.\n"
        )
    return f"On {machine(results)}:\n\n{table(('', 'RWKV-7, tokens/s', 'GPT, tokens/s', 'ratio'), rows)}\n{said}"


def profile(results: Mapping[str, Any]) -> str:
    rows = [(row["what"], f"{row['ms_a_step']:.0f}", f"{row['share']:.0%}") for row in results["rows"]]
    return f"On {machine(results)}:\n\n{table(('what', 'ms a step', 'share'), rows)}\n"


def gpu(results: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['size']}, {'RWKV-7' if row['model'] == 'rwkv7' else 'GPT'}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['TFLOP/s']:.0f}",
            f"{row['MFU of a product']:.0%}",
            f"{row['MFU of the peak']:.0%}" if row["MFU of the peak"] else "",
            f"{row['GB held at most']:.1f}",
            f"{row['times as fast as the GPT']:.2f}",
        )
        for row in results["rows"]
    ]
    told = results["rows"][0]
    heads = ("", "tokens/s", "TFLOP/s", "of a product's speed", "of the peak", "GB", "GPT's speed = 1")
    return (
        f"{results['machine']['device']}, {told['rows']} rows of {told['length']:,} tokens:\n\n{table(heads, rows)}\n"
    )


BLOCKS = {"train_cpu": gpt, "train_profile": profile, "train_gpu": gpu}
"""Benchmark -> what it becomes on the page."""


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows))


if __name__ == "__main__":
    main()
