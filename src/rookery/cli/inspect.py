"""Say what a model file is: format, family, sizes, precision, tokenizer, fingerprint. Nothing in it is executed."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a model file of any readable format, a folder with one, or a Hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--memory", action="store_true", help="write some tokens and say which bytes of the model that took, by part"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="how many, for --memory (64)")


def run(args: argparse.Namespace) -> int:
    if args.memory:
        from rookery.checkpoints.checkpoint import open_checkpoint
        from rookery.engine import memory

        found = memory.measure(open_checkpoint(args.file), tokens=args.tokens)
        print(json.dumps(found.as_dict(), indent=2) if args.json else memory.render(found))
        return 0
    from rookery.checkpoints.describe import inspect, render

    summary = inspect(args.file)
    print(json.dumps(summary, indent=2) if args.json else render(summary))
    return 0
