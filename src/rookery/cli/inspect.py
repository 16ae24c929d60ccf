"""Say what a model file is: format, family, sizes, precision, tokenizer, fingerprint. Nothing in it is executed."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a model file of any readable format, a folder with one, or a Hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from rookery.checkpoints.describe import inspect, render

    summary = inspect(args.file)
    print(json.dumps(summary, indent=2) if args.json else render(summary))
    return 0
