"""Pictures and texts in one space: find pictures by words, or write their vectors for a search of your own.

  rookery embed photos/ --text "a dog" --text "the sea" --model out/clip --sheet found.png
  rookery embed photos/ --model out/clip --out vectors.npz

The model is a file or folder of RWKV-CLIP. Folders stand for the pictures below them.
"""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="picture files, or folders of them")
    parser.add_argument("--model", required=True, help="RWKV-CLIP: a file, or the folder of a run")
    parser.add_argument("--text", action="append", default=[], help="what to look for; may be given again")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="pictures to show for each text (%(default)s)")
    parser.add_argument("--sheet", metavar="FILE", help="picture to write: a row of the pictures found for each text")
    parser.add_argument("--out", metavar="FILE", help=".npz to write: names, images, texts, text_features")
    parser.add_argument("--tokenizer", metavar="FILE", help="CLIP's, for models that bring none")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (%(default)s)')
    parser.add_argument("--json", action="store_true", help="one JSON object a text")


def run(given: argparse.Namespace) -> int:
    from rookery.cli.train import before_torch

    before_torch()
    from rookery.evaluate.retrieval import Embedder, search, search_sheet, write_vectors

    if not given.text and not given.out:
        raise ValueError("nothing to do: give --text to search, or --out to write vectors")
    if given.top < 1:
        raise ValueError(f"--top must be at least 1, got {given.top}")
    paths = pictures(given.images)
    embedder = Embedder.open(given.model, given.tokenizer, given.device)
    images, texts = embedder.images(paths), embedder.embed_texts(given.text) if given.text else None
    if given.out:
        write_vectors(given.out, [str(path) for path in paths], images, given.text, texts)
        print(f"{given.out}: {len(paths)} pictures, {len(given.text)} texts", file=sys.stderr)
    if texts is None:
        return 0
    found = search(images, texts, given.top)
    for text, hits in zip(given.text, found):
        named = [(str(paths[place]), score) for place, score in hits]
        if given.json:
            print(json.dumps({"text": text, "images": dict(named)}, ensure_ascii=False))
        else:
            print(f"{text}:")
            print("\n".join(f"  {score:6.3f}  {name}" for name, score in named))
    if given.sheet:
        search_sheet(given.sheet, paths, given.text, found)
        print(f"{given.sheet}: a row for each text", file=sys.stderr)
    return 0


def pictures(given: list[str]) -> list[Path]:
    """Files, and in place of folders the pictures below them; ValueError where there is none."""
    from rookery.data.images import SUFFIXES

    found: list[Path] = []
    for path in map(Path, given):
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"there is no picture in {str(path)!r}")
        found += below
    return found
