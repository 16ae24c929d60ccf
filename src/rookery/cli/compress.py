"""Make an RWKV-4 to 7 model fit into little memory (RWKV-Lite). OUT is whole or absent; `rookery generate` runs it.

Without any option: sparse channel mixes, a head in two levels and a cache of embedding rows. What guesses learns from
text that the model writes itself, or from --text, which should be like what the model will read.
"""

import argparse
import sys

FLAGS = {
    "low_rank": ("--low-rank", int, "K", "keep projections as factors of rank width / K, 8 or 4 (whole)"),
    "train_steps": ("--train", int, "N", "then train all weights for N steps on --text (0)"),
    "lr": ("--lr", float, "X", "peak learning rate of that (5e-4)"),
    "predictor": ("--predictor", int, "H", "hidden units of the networks that guess hidden units; 0: none (64)"),
    "threshold": ("--threshold", float, "P", "use units whose predicted probability is above P (0.7)"),
    "shadow_bits": ("--shadow-bits", int, "B", "bits of the key matrices' shadows: 1, 2, 4; 0: none (1)"),
    "shadow_quantile": ("--shadow-quantile", float, "Q", "share of units that a shadow does not choose (0.95)"),
    "shadow_levels": ("--shadow-levels", str, "NAME", "minmax, or row for 1 bit (minmax)"),
    "least_zeros": ("--least-zeros", float, "P", "layers with a smaller share of zeros stay dense (0.5)"),
    "clusters": ("--clusters", int, "K", "clusters of the head; 0: the head stays whole (200)"),
    "largest_cluster": ("--largest-cluster", float, "X", "most tokens of one, in multiples of their mean (any number)"),
    "mass": ("--mass", float, "P", "guessed probability of the clusters that are computed (0.95)"),
    "fewest": ("--fewest", int, "N", "clusters that are computed at least (3)"),
    "most": ("--most", int, "N", "and at most (100)"),
    "embedding_rows": ("--embedding-rows", int, "N", "rows of the embedding kept in memory; 0: no cache (1000)"),
    "samples": ("--samples", int, "N", "tokens to learn from (5000)"),
    "seed": ("--seed", int, "N", "of all that is random (0)"),
}
"""Field of `rookery.compress.Settings` -> flag, type, name of the value, help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="model file, folder or Hub id (the embedded model)")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="the .safetensors file to write")
    parser.add_argument("--text", metavar="FILE", action="append", help="text to learn from; repeatable")
    parser.add_argument("--tokenizer", metavar="NAME", help="world, 20b, bytes, or a vocabulary file (found by itself)")
    parser.add_argument("--int8", action="store_true", help="8 bits a number for large matrices")
    for field, (flag, kind, metavar, text) in FLAGS.items():
        parser.add_argument(flag, dest=field, type=kind, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> int:
    import torch

    from rookery.checkpoints.checkpoint import open_checkpoint
    from rookery.compress import Settings, compress
    from rookery.engine.llm import model_path

    given = {field: getattr(args, field) for field in FLAGS if getattr(args, field) is not None}
    settings = Settings(int8=args.int8, **given)
    if settings.train_steps and not args.text:
        raise ValueError("--train goes on training the model and needs text: give --text FILE")
    checkpoint = open_checkpoint(model_path(args.model))
    tokens = torch.tensor(_tokens(args, checkpoint)) if args.text else None

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    made = compress(checkpoint, args.out, settings, tokens=tokens, say=say)
    say(f"{args.out}: {', '.join(made.manifest.techniques()) or 'nothing was compressed'}")
    say(f"`rookery inspect --memory {args.out}` shows what memory it needs")
    return 0


def _tokens(args: argparse.Namespace, checkpoint) -> list[int]:
    """The texts as one row of tokens, each document followed by token 0."""
    from pathlib import Path

    from rookery.data.text import read_documents, tokenize
    from rookery.tokenizers import resolve

    vocab_size = checkpoint.config.vocab_size
    found = resolve(args.tokenizer, path=checkpoint.path, vocab_size=vocab_size, metadata=checkpoint.metadata)
    documents = [document for path in args.text for document in read_documents(Path(path))]
    return tokenize(documents, found).tokens.tolist()
