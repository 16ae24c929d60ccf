"""Nats per character of the embedded model and of its teacher on held-out stories, and samples to read.

    python examples/embedded_model/evaluate.py out/embedded/run/model.safetensors out/embedded/vocab.txt \
        --teacher MODEL.bin VOCAB --stories out/embedded/held-out-*.jsonl

Both models read the same stories from their beginning and must predict the end as well; the teacher sees at most its
256 characters, in windows that overlap by half.
"""

import argparse
import json
from pathlib import Path

import torch
from sample_stories import BOS, CARRIED, WINDOW, load_teacher, read_vocabulary
from torch import Tensor

from rookery.data.text import END_OF_TEXT
from rookery.models import load
from rookery.tokenizers import load_tokenizer


def log_likelihood(model, tokens: Tensor) -> Tensor:
    """Log-probability of every token of a row [t] after those before it, [t − 1]."""
    logits, _ = model(tokens[None])
    return logits[0, :-1].float().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def student_nats(model, tokenizer, story: str) -> float:
    ids = [END_OF_TEXT, *tokenizer.encode(story), END_OF_TEXT]
    return -float(log_likelihood(model, torch.tensor(ids)).sum())


def teacher_nats(model, ids_of: dict[str, int], story: str) -> float:
    row = torch.tensor([BOS, ids_of[" "], *(ids_of[c] for c in story), BOS])
    total = log_likelihood(model, row[:WINDOW]).sum()
    for start in range(CARRIED, len(row) - CARRIED, CARRIED):
        total += log_likelihood(model, row[start : start + WINDOW])[CARRIED - 1 :].sum()
    return -float(total)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--teacher", type=Path, nargs=2, required=True, metavar=("MODEL", "VOCAB"))
    parser.add_argument("--stories", type=Path, nargs="+", required=True)
    parser.add_argument("--most", type=int, default=100, help="stories read of each file")
    given = parser.parse_args()
    student, tokenizer = load(given.model, dtype=torch.float32), load_tokenizer(str(given.vocabulary))
    teacher = load_teacher(given.teacher[0])
    ids_of = {piece: i for i, piece in enumerate(read_vocabulary(given.teacher[1]))}
    for path in given.stories:
        stories = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        # the teacher has no way to spell the few stories with other characters
        stories = [story for story in stories if set(story) <= ids_of.keys()][: given.most]
        characters = sum(map(len, stories))
        ours = sum(student_nats(student, tokenizer, story) for story in stories) / characters
        theirs = sum(teacher_nats(teacher, ids_of, story) for story in stories) / characters
        print(f"{path.name}: {len(stories)} stories, nats per character: embedded {ours:.4f}, teacher {theirs:.4f}")


if __name__ == "__main__":
    main()
