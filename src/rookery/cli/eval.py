"""Measure a model. Without --model, the one that ships with the package; runs with torch.

tasks:
  perplexity FILE  bits per byte of a text (.txt of any length, .jsonl, .json)
  lambada FILE     last words of passages (lambada_test.jsonl)
  mmlu FILE        four choices, the official zero-shot prompt (a tar of Arrow files, or .jsonl)
  choices FILE     requests of the OLMo project (.jsonl, .jsonl.gz)
  blimp FILE       grammatical pairs (BLiMP.zip, or one of its .jsonl)
  needle           a pass key in a long text
  positions FILE   loss by position; --plot draws it
  lm-eval          tasks of EleutherAI's harness, by --tasks
  images DATA      accuracy of a classifier of images (a folder, .tar, .npz, "digits")
  zero-shot DATA   the same for RWKV-CLIP, which is told the classes by their names
  retrieval FILE   RWKV-CLIP's recall on pictures with texts (.jsonl, .csv, .tar)
"""

import argparse
import json
import sys
from typing import Any

from rookery.cli.train import before_torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="one of the tasks above")
    parser.add_argument("data", nargs="?", metavar="FILE", help="the task's text or questions")
    parser.add_argument("-m", "--model", metavar="PATH", help="model file, folder or Hub id (the embedded model)")
    parser.add_argument("--tokenizer", metavar="NAME", help="world, 20b, bytes, or a vocabulary file (found by itself)")
    parser.add_argument("--adapter", metavar="FILE", help="merge an adapter of RWKV-PEFT or a folder of peft")
    parser.add_argument("--adapter-alpha", type=float, metavar="X", help="alpha of a LoRA whose file does not say it")
    parser.add_argument("--state", metavar="FILE", help="tuned state that every text begins with")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions or texts")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="as cuda (cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (float32 on a CPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    parser.add_argument("--budget", type=int, default=4096, metavar="N", help="tokens of one call (4096)")
    parser.add_argument("--no-reuse", action="store_true", help="read beginnings that requests share once for each")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    group = parser.add_argument_group("perplexity")
    group.add_argument("--mode", choices=("carried", "sliding"), help="state carried along, or a window (carried)")
    group.add_argument("--window", type=int, metavar="N", help="tokens of a sliding window (1024)")
    group.add_argument("--stride", type=int, metavar="N", help="tokens that it moves (512)")
    group = parser.add_argument_group("needle and positions")
    group.add_argument("--lengths", metavar="N,N", help="tokens of the texts with a needle (512,1024,2048,4096)")
    group.add_argument("--trials", type=int, metavar="N", help="keys for each length and depth (5)")
    group.add_argument("--length", type=int, metavar="N", help="positions (2048)")
    group.add_argument("--rows", type=int, metavar="N", help="texts that losses are the mean of (16)")
    group.add_argument("--plot", metavar="PNG", help="draw the losses")
    group.add_argument("--trained-length", type=int, metavar="N", help="mark this position in the plot")
    group = parser.add_argument_group("lm-eval")
    group.add_argument("--tasks", metavar="NAME,NAME", help="tasks of the harness; their data are downloaded")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (the task's own)")


VISUAL = ("images", "zero-shot", "retrieval")
"""Tasks for other models than those of language."""
OPTIONS = {
    "perplexity": ("mode", "window", "stride"),
    "needle": ("lengths", "trials"),
    "positions": ("length", "rows", "plot", "trained_length"),
    "lm-eval": ("tasks", "num_fewshot"),
}
"""Task -> options that are its own."""


def run(args: argparse.Namespace) -> int:
    before_torch()
    from rookery.evaluate.run import evaluate, load_for_evaluation

    options = {name: getattr(args, name) for name in OPTIONS.get(args.task, ()) if getattr(args, name) is not None}
    foreign = {n for names in OPTIONS.values() for n in names if getattr(args, n) is not None} - options.keys()
    if foreign:
        print(f"rookery eval: {args.task} has no option --{min(foreign).replace('_', '-')}", file=sys.stderr)
        return 2
    if "lengths" in options:
        options["lengths"] = [int(length) for length in options["lengths"].split(",")]
    if "tasks" in options:
        options["tasks"] = options["tasks"].split(",")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    if args.task in VISUAL:
        from rookery.evaluate.pictures import run as measure

        result = measure(
            args.task, args.model, args.data, device=args.device, limit=args.limit, tokenizer=args.tokenizer
        )
        print(json.dumps(result, indent=2) if args.json else "\n".join(lines(result)))
        return 0
    model, tokenizer = load_for_evaluation(
        args.model,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=args.dtype,
        adapter=args.adapter,
        adapter_alpha=args.adapter_alpha,
    )
    result = evaluate(
        args.task,
        model,
        tokenizer,
        args.data,
        limit=args.limit,
        state=args.state,
        budget=args.budget,
        reuse=not args.no_reuse,
        options=options,
    )
    print(json.dumps(result, indent=2) if args.json else "\n".join(lines(result)))
    return 0


def lines(result: dict[str, Any], indent: str = "") -> list[str]:
    """The result to be read: a line per number, tables as rows."""
    shown = []
    for key, value in result.items():
        if isinstance(value, dict):
            shown += [f"{indent}{key}:", *lines(value, indent + "  ")]
        elif isinstance(value, list):
            shown += [f"{indent}{key}:", *("  ".join(f"{k} {_number(v)}" for k, v in row.items()) for row in value)]
        else:
            shown.append(f"{indent}{key} {_number(value)}")
    return shown


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
