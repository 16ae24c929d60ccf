"""Tuned states: the state that a text begins from, trained while the weights stay as they are.

  rookery state tune DATA --out DIR         train one on texts or conversations
  rookery state eval STATE FILE             bits per byte of a text, with the state and without
  rookery state compress STATE --out FILE   keep the largest directions of every head
  rookery state mix STATE STATE --out FILE  their weighted sum
  rookery state tts PROMPT --mode MODE      tune one for a single prompt, then answer it

`rookery generate --state FILE` uses what is written. Without --model, the one that ships with the package.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, add in (("tune", _tune), ("eval", _eval), ("compress", _compress), ("mix", _mix), ("tts", _tts)):
        add(actions.add_parser(name, help=SUMMARY[name], description=SUMMARY[name], allow_abbrev=False))


SUMMARY = {
    "tune": "Train a start state; as `rookery finetune state`, which knows more settings.",
    "eval": "Measure what a state does to a text's bits per byte.",
    "compress": "Write a state with a lower rank per head; prints what is lost.",
    "mix": "Write a weighted sum of states. Styles usually switch at some weight and do not blend.",
    "tts": "Tune a state for one prompt with a guide or a score (test-time scaling), then answer.",
}


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="texts or conversations: .txt, .jsonl, .json, .parquet")
    parser.add_argument("-o", "--out", metavar="DIR", default="out/state", help="folder of the run (%(default)s)")
    parser.add_argument("-m", "--model", metavar="PATH", default="embedded", help="model file, folder or Hub id")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the optimiser (the recipe's)")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate (the recipe's: 1.0)")
    parser.add_argument("--from", dest="begin", metavar="FILE", help="begin from this state (zeros)")
    parser.add_argument("--features", type=int, metavar="N", help="kernel features per head, RWKV-5 to 7 (0: plain)")
    parser.add_argument("--transition", choices=("full", "none"), help="whether a kernel state decays (full)")
    parser.add_argument("--decorrelate", action="store_true", help="decorrelate what is trained; use --lr 0.1")
    parser.add_argument("--shifts", action="store_true", help="train the token before the first, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the recipe")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", metavar="STATE", help="tuned state, of any program")
    parser.add_argument("text", metavar="FILE", help="text, .txt, .jsonl or .json")
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", metavar="STATE", help="tuned state, of any program")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="safetensors file to write")
    parser.add_argument("--rank", type=int, default=4, metavar="N", help="directions per head (%(default)s)")


def _mix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("states", metavar="STATE", nargs="+", help="tuned states of one model")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="safetensors file to write")
    parser.add_argument("--weights", metavar="X,X", help="a weight for each (equal ones that make 1)")


def _tts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what is to be answered")
    parser.add_argument("--mode", choices=("distil", "reward", "select"), default="select", help="(%(default)s)")
    _add_model(parser)
    parser.add_argument("--state", metavar="FILE", help="tuned state to begin with (zero)")
    parser.add_argument("--guide", metavar="PATH", help="model that guides, of the same vocabulary (--model itself)")
    parser.add_argument("--guide-state", metavar="FILE", help="tuned state of the guide")
    parser.add_argument("--wanted", metavar="REGEX", help="score answers by how often this matches, not by a guide")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of the optimiser (%(default)s)")
    parser.add_argument("--continuations", type=int, default=4, metavar="N", help="of the guide, a step (%(default)s)")
    parser.add_argument("--answers", type=int, default=8, metavar="N", help="of the model, a step (%(default)s)")
    parser.add_argument("-n", "--max-tokens", type=int, default=32, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, metavar="X", help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same answer (%(default)s)")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the state that was found")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="PATH", help="model file, folder or Hub id (the embedded model)")
    parser.add_argument("--tokenizer", metavar="NAME", help="world, 20b, bytes, or a vocabulary file (found by itself)")


def run(args: argparse.Namespace) -> int:
    return {"tune": tune, "eval": evaluate, "compress": compress, "mix": mix, "tts": tts}[args.action](args)


def tune(args: argparse.Namespace) -> int:
    """Runs the recipe `state` with what was given."""
    from rookery.cli.train import run_recipe

    given: dict[str, Any] = {
        "base": args.model,
        "data.path": args.data,
        "out": args.out,
        "steps": args.steps,
        "optim.lr": args.lr,
        "adapt.start": args.begin,
        "adapt.features": args.features,
        "adapt.transition": args.transition,
        "adapt.decorrelate": "true" if args.decorrelate else None,
        "adapt.shifts": "true" if args.shifts else None,
    }
    settings = [f"{name}={value}" for name, value in given.items() if value is not None]
    code = run_recipe(argparse.Namespace(recipe="state", set=settings + args.set, dry_run=False), default="state")
    if code == 0:
        print(Path(args.out) / "state.safetensors")
    return code


def evaluate(args: argparse.Namespace) -> int:
    """Perplexity twice."""
    from rookery.cli.train import before_torch

    before_torch()
    from rookery.evaluate.run import evaluate, load_for_evaluation

    model, tokenizer = load_for_evaluation(args.model, tokenizer=args.tokenizer)
    found = {
        how: evaluate("perplexity", model, tokenizer, args.text, state=state)["bits_per_byte"]
        for how, state in (("without the state", None), ("with the state", args.state))
    }
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for how, value in found.items():
            print(f"{how:<18} {value:.4f} bits per byte")
    return 0


def compress(args: argparse.Namespace) -> int:
    """Cuts the rank of every head's matrix."""
    from rookery.checkpoints.tuned_state_arithmetic import compress

    lost = compress(args.state, args.out, rank=args.rank)
    before, after = os.path.getsize(args.state), os.path.getsize(args.out)
    print(f"{before:,} -> {after:,} bytes; lost: {100 * lost:.3g}% of the squared numbers")
    return 0


def mix(args: argparse.Namespace) -> int:
    """Adds states up."""
    from rookery.checkpoints.tuned_state_arithmetic import mix

    weights = None if args.weights is None else [float(weight) for weight in args.weights.split(",")]
    mix(args.states, args.out, weights=weights)
    return 0


def tts(args: argparse.Namespace) -> int:
    """Tunes for one prompt and answers it with the likeliest tokens (mode "select": with the best answer)."""
    from rookery.cli.train import before_torch

    before_torch()
    from rookery.adapt.at_test_time import Budget, answer_at_test_time
    from rookery.adapt.state_tuning import save_start
    from rookery.evaluate.run import load_for_evaluation

    model, tokenizer = load_for_evaluation(args.model, tokenizer=args.tokenizer)
    guide = model
    if args.guide is not None:
        guide, _ = load_for_evaluation(args.guide, tokenizer=args.tokenizer)
    if args.mode == "distil" and args.guide is None and args.guide_state is None:
        print("rookery state tts: --mode distil needs --guide MODEL or --guide-state FILE", file=sys.stderr)
        return 2
    budget = Budget(
        steps=args.steps,
        continuations=args.continuations,
        answers=args.answers,
        length=args.max_tokens,
        lr=args.lr,
        seed=args.seed,
    )
    options = {"state": args.state, "guide_state": args.guide_state, "wanted": args.wanted}
    start, answer, spent = answer_at_test_time(model, tokenizer, args.prompt, args.mode, guide, budget, **options)
    if args.out:
        save_start(start, args.out, model)
    if args.json:
        told = {"answer": answer, "forward_equivalents": spent.forward_equivalents, "scores": spent.scores}
        print(json.dumps(told | {"losses": spent.losses}, indent=2))
    else:
        print(answer)
        print(f"{spent.forward_equivalents:,.0f} forward-equivalents", file=sys.stderr)
    return 0
