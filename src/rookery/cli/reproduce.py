"""Try a paper's claim on this machine: table, plot and verdict.

Writes NAME.md, NAME.png and NAME.json to the folder `--out`. Interrupted, the same command goes on where it stopped.
"""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="which one; `--list` shows them")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the whole path at toy size, in seconds; proves nothing")
    size.add_argument("--full", action="store_true", help="the whole experiment (else about five minutes of it)")
    parser.add_argument("--data", metavar="DIR", help="data folder ($ROOKERY_DATA, else ../shared/data)")
    parser.add_argument("--out", metavar="DIR", default="out/reproductions", help="where the files go (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the reproductions and stop")


def run(given: argparse.Namespace) -> int:
    from rookery.cli.train import before_torch
    from rookery.reproduce import REPRODUCTIONS, reproduction

    if given.list or given.name is None:
        width = max(map(len, REPRODUCTIONS))
        for name, summary in REPRODUCTIONS.items():
            print(f"{name:<{width}}  {summary}")
        return 0
    before_torch()
    reproduction(given.name)  # a wrong name is told before torch is imported
    from rookery.reproduce.report import markdown_table, run
    from rookery.train.memory import keep_freed_memory

    keep_freed_memory()
    scale = "quick" if given.quick else "full" if given.full else "default"
    path = run(given.name, scale=scale, data=given.data or os.environ.get("ROOKERY_DATA"), out=given.out)
    record = json_record(path)
    print(f"{record['claim']}\n\n{markdown_table(record['table'])}\n\nverdict: {record['verdict']} at this scale")
    print(f"written: {path.with_suffix('.md')}, .png, .json", file=sys.stderr)
    return 0


def json_record(path) -> dict:
    """The record that a run wrote."""
    import json

    return json.loads(path.read_text(encoding="utf-8"))
