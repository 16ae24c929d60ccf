"""Turn a model file into another format or precision. DST is whole or absent, whatever happens."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from rookery.cli.options import add_settings

if TYPE_CHECKING:
    from rookery.checkpoints.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model file, folder or Hub id, of any readable format")
    parser.add_argument(
        "destination",
        metavar="DST",
        help="its ending names the format (.safetensors, .pth, .gguf, .bin); without one, a folder with config.json",
    )
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="official, pth, hf, fla, ggmf or gguf, whatever DST ends with; lora or miss for a MiSS, Bone or DiSHA",
    )
    parser.add_argument("--base", default="", metavar="MODEL", help="model that an adapter is for, with --to lora")
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32, float16 or bfloat16; gguf also q8_0, q4_0; .safetensors int8, int4 (the source's precision)",
    )

    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from rookery.checkpoints.checkpoint import open_checkpoint

    if args.to in ("lora", "miss"):
        from rookery.checkpoints.adapter_convert import convert_adapter

        made = convert_adapter(args.source, args.destination, args.to, base=args.base)
        print(f"{made}: an adapter for peft, {args.to}", file=sys.stderr)
        return 0
    source = open_checkpoint(args.source, settings=dict(args.setting))
    return write(source, args.destination, to=args.to, dtype=args.dtype)


def write(source: str | Checkpoint, destination: str, *, to: str | None, dtype: str | None) -> int:
    """Converts and tells what was done."""
    from rookery.checkpoints.convert import convert
    from rookery.checkpoints.describe import readable

    bar = _Bar() if sys.stderr.isatty() else None
    started = time.perf_counter()
    try:
        done = convert(source, destination, to=to, dtype=dtype, progress=bar)
    finally:
        if bar:
            bar.close()
    seconds = time.perf_counter() - started
    rate = readable(int(done.nbytes / max(seconds, 1e-9)))
    print(f"{done.path}: {done.target}, {readable(done.nbytes)} read in {seconds:.1f} s ({rate}/s)", file=sys.stderr)
    for path in done.beside:
        print(f"beside it: {path}", file=sys.stderr)
    if done.left_out:
        print(f"left out, as no model uses them: {', '.join(done.left_out)}", file=sys.stderr)
    for remark in done.remarks:
        print(remark, file=sys.stderr)
    return 0


class _Bar:
    """One line on the terminal that is written over: share, rate, time left."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.shown < 0.1 and done < total:
            return
        self.shown = now
        rate = done / max(now - self.started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        line = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left:.0f} s left"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
