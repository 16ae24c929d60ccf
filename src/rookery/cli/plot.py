"""Draw the curves of training runs: loss, learning rate, gradient norm, tokens a second.

rookery plot out/small out/large --out curves.png
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--out", default="plot.png", metavar="FILE", help="PNG to write (plot.png)")
    parser.add_argument("--by", choices=("step", "tokens"), default="step", help="what runs along the bottom (step)")


def run(args: argparse.Namespace) -> int:
    from rookery.train.plot import plot

    plot(args.runs, args.out, args.by)
    print(args.out)
    return 0
