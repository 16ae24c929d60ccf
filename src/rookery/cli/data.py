"""Turn texts into tokens, once, for `rookery train`.

  rookery data build books.jsonl more.parquet --out tokens --tokenizer world --processes 8

Writes tokens.bin and tokens.idx, which RWKV-LM and RWKV-PEFT read as well. Sources: .txt, .jsonl with a "text" field,
.json with a list of strings, .parquet with a "text" column, "hf:NAME:SPLIT" for a data set of the Hub.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="write a binidx data set")
    build.add_argument("sources", nargs="+", metavar="SOURCE")
    build.add_argument("--out", required=True, metavar="NAME", help="NAME.bin and NAME.idx are written")
    build.add_argument("--tokenizer", default="world", metavar="NAME", help="world, 20b, bytes, or a vocabulary file")
    build.add_argument("--processes", type=int, default=1, metavar="N", help="processes that tokenize (1)")

    describe = verbs.add_parser("describe", help="describe pictures by what is known of them, for RWKV-CLIP")
    describe.add_argument("source", help="JSONL with raw, synthetic, tags a line")
    describe.add_argument("--out", required=True, metavar="FILE", help="the same with a text called generated")
    describe.add_argument("--url", help="server of OpenAI's protocol, ending in /v1 (default: no model, by rule)")
    describe.add_argument("--model", default="default", help="model to ask there (%(default)s)")
    describe.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="holds the key (%(default)s)"
    )


def describe_pairs(args: argparse.Namespace) -> int:
    from rookery.data.describe import LLMFuser, TemplateFuser, describe_file, endpoint

    key = os.environ.get(args.key_variable, "")
    fuse = LLMFuser(endpoint(args.url, args.model, key)) if args.url else TemplateFuser()
    counts = describe_file(args.source, args.out, fuse, lambda text: print(text, file=sys.stderr))
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    return 0


def run(args: argparse.Namespace) -> int:
    if args.verb == "describe":
        return describe_pairs(args)
    from rookery.data.build import build

    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")
    size = sum(Path(source).stat().st_size for source in args.sources if Path(source).is_file())
    with _Progress(size) as progress:
        built = build(args.sources, args.out, args.tokenizer, args.processes, progress)
    seconds = time.perf_counter() - progress.began
    print(
        f"{args.out}.bin and {args.out}.idx: {built.documents:,} documents, {built.tokens:,} tokens, "
        f"{built.characters / max(1, built.tokens):.2f} characters a token, {built.characters / seconds / 1e6:.1f} M "
        "characters a second"
    )
    return 0


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, on stderr."""

    def __init__(self, size: int) -> None:
        self.began = self._said = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            # bytes of files against characters: near enough for a bar
            self._task = self._bar.add_task("", total=size or None)

    def __enter__(self) -> "_Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, built: Any) -> None:
        now = time.perf_counter()
        text = f"{built.tokens:,} tokens, {built.characters / (now - self.began) / 1e6:.1f} M characters/s"
        if self._bar:
            self._bar.update(self._task, completed=built.characters, description=text)
        elif now - self._said > 10:
            self._said = now
            print(text, file=sys.stderr, flush=True)
