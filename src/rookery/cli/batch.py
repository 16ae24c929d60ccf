"""Write the texts of many prompts. IN and OUT hold a JSON object a line; the same command goes on where it stopped.

A line of IN has "prompt" or "messages" and may have options of its own ("max_tokens", "temperature", …) and an "id".
A line of OUT has the "index" of the prompt (from 0), "text", "finish_reason", counts and the seed.
"""

import argparse
import sys

from rookery.cli.options import add_cache, add_model, add_sampling, cached, load_llm, text_options
from rookery.cli.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="file of prompts (.jsonl)")
    parser.add_argument("destination", metavar="OUT", help="file of texts (.jsonl); what it has is not made again")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="texts that are made side by side (32)")
    parser.add_argument("--template", metavar="NAME", help="form of conversation: g1, world, raven (by file name)")
    add_model(parser)
    add_sampling(parser, max_tokens=256)
    add_cache(parser)


def run(args: argparse.Namespace) -> int:
    from rookery.engine.batch import run_batch

    llm = load_llm(args, args.template, preload=True)
    options = text_options(args) | {"seed": args.seed or 0}
    progress = Progress("prompts")
    done = total = 0
    try:
        with cached(llm, args):
            for done, total in run_batch(llm, args.source, args.destination, rows=args.rows, **options):
                progress(done, total)
    except KeyboardInterrupt:
        progress.close()
        print(f"{done} of {total} texts are in {args.destination}; the same command goes on", file=sys.stderr)
        raise
    progress.close()
    print(f"{total} texts in {args.destination}", file=sys.stderr)
    return 0
