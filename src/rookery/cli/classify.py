"""Name what pictures show: the likeliest classes of each, with their probabilities.

The model is a file or folder of Vision-RWKV: one of the published ones, or model.safetensors of `rookery train`.
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--model", required=True, help="classifier: a file, or the folder of a run")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (%(default)s)")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (%(default)s)')
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(given: argparse.Namespace) -> int:
    from rookery.cli.train import before_torch

    before_torch()
    from rookery.evaluate.images import Classifier

    classifier = Classifier.open(given.model, given.device)
    for path in given.images:
        (found,) = classifier.classify([path], given.top)
        if given.json:
            print(json.dumps({"image": path, "classes": dict(found)}, ensure_ascii=False))
        else:
            print(f"{path}: " + ", ".join(f"{name} {chance:.1%}" for name, chance in found))
    return 0
