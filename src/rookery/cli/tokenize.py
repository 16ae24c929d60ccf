"""Show the tokens of a text, or count them. Without TEXT it is read from stdin."""

import argparse
import json
from typing import Any

from rookery.cli.options import read_stdin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="text to split; - or nothing reads it from stdin")
    parser.add_argument("-m", "--model", metavar="PATH", help="use the tokenizer of this model (the embedded model)")
    parser.add_argument("--tokenizer", metavar="NAME", help="world, 20b, bytes, or a vocabulary file")
    parser.add_argument("--count", action="store_true", help="only the number of tokens")
    parser.add_argument("--ids", action="store_true", help="only the ids, on one line")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    tokenizer = _tokenizer(args)
    text = read_stdin() if args.text in (None, "-") else args.text
    ids = tokenizer.encode(text)
    if args.json:
        pieces = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
        summary = {"tokenizer": tokenizer.name, "count": len(ids), "ids": ids, "pieces": pieces}
        print(json.dumps(summary, ensure_ascii=False))
    elif args.count:
        print(len(ids))
    elif args.ids:
        print(*ids)
    else:
        for token in ids:
            print(f"{token:>6}  {_readable(tokenizer.token_bytes(token))}")
    return 0


def _tokenizer(args: argparse.Namespace) -> Any:
    from rookery.tokenizers import load_tokenizer, resolve

    if args.tokenizer is not None and args.model is None:
        return load_tokenizer(args.tokenizer)
    from rookery.checkpoints.checkpoint import open_checkpoint
    from rookery.engine.llm import model_path

    checkpoint = open_checkpoint(model_path(args.model))
    return resolve(
        args.tokenizer,
        path=checkpoint.path,
        vocab_size=checkpoint.config.vocab_size,
        metadata=checkpoint.metadata,
    )


def _readable(piece: bytes) -> str:
    """The piece as a Python literal: line ends and spaces are seen, and bytes that are no text."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)
