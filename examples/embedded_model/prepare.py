"""Turns sampled stories and plain text into what the recipe "embedded" reads.

    python examples/embedded_model/prepare.py out/stories out/embedded --text tinystories.txt --keep 0.65

Of the sampled stories the share `--keep` that the teacher itself finds likeliest stays: its less likely ones are its
slips. Plain text is cut into stories and repeated `--repeat` times, since there is
little of it. The held-out part comes from both: the last documents of each source.
"""

import argparse
import json
import random
import re
from pathlib import Path

from rookery.tokenizers.train import train_vocabulary, write_vocabulary


def best_stories(folder: Path, share: float) -> list[str]:
    """The likeliest stories of a sampled folder, by mean log-likelihood a character."""
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    rows.sort(key=lambda row: row["score"], reverse=True)
    return [tidy(row["text"]) for row in rows[: round(share * len(rows))]]


def documents(path: Path) -> list[str]:
    """Stories of a text file, cut at their usual opening and at lone line breaks (their paragraphs end with two)."""
    text = path.read_text(encoding="utf-8").replace("<|endoftext|>", "\n\n")
    return [tidy(part) for part in re.split(r"\n\n+(?=Once upon a time)|(?<!\n)\n(?!\n)", text) if part.strip()]


def tidy(text: str) -> str:
    """Plain quotes and dashes, one line break between paragraphs, no trailing blanks."""
    for fancy, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("–", "-"), ("—", "-"), ("…", "...")):
        text = text.replace(fancy, plain)
    return re.sub(r"[ \t]*\n\s*", "\n", text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sampled", type=Path, help="folder that sample_stories.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="plain text files to add")
    parser.add_argument("--keep", type=float, default=0.65)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--held-out", type=float, default=0.02)
    parser.add_argument("--pieces", type=int, default=2048)
    given = parser.parse_args()
    learned, held_out = [], {}
    sources = {"sampled": best_stories(given.sampled, given.keep)} | {path.stem: documents(path) for path in given.text}
    shuffled = random.Random(0)
    for name, stories in sources.items():
        shuffled.shuffle(stories)
        cut = len(stories) - max(1, round(given.held_out * len(stories)))
        held_out[name] = stories[cut:]
        learned += stories[:cut] * (1 if name == "sampled" else given.repeat)
        print(f"{name}: {len(stories)} stories, {sum(map(len, stories)):,} characters")
    shuffled.shuffle(learned)
    given.out.mkdir(parents=True, exist_ok=True)
    write(given.out / "stories.jsonl", learned)
    write(given.out / "held-out.jsonl", [story for stories in held_out.values() for story in stories])
    for name, stories in held_out.items():
        write(given.out / f"held-out-{name}.jsonl", stories)
    write_vocabulary(train_vocabulary(learned, given.pieces), given.out / "vocab.txt")


def write(path: Path, stories: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": s}, ensure_ascii=False) + "\n" for s in stories), encoding="utf-8")


if __name__ == "__main__":
    main()
