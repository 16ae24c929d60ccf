"""Encoding MB/s of our tokenizer against the Rust one, one thread, in one interleaved run.

    pip install pyrwkv-tokenizer
    python benchmarks/tokenizer.py [TEXT_FILE …] [--save]

Without files the text is 10 MB of Python's own sources and documentation strings. Each text is encoded whole and in
documents of 4,000 characters; both must give the same ids. Also: the time to load the vocabulary from its text file.
"""

import argparse
import sysconfig
from pathlib import Path

from support import Machine, Seconds, interleaved, report

from rookery.tokenizers import load_tokenizer

OURS, RUST = "rookery", "pyrwkv-tokenizer"


def python_sources(size: int) -> str:
    """The first `size` characters of the standard library: English prose and code."""
    parts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and total < size:
            parts.append(path.read_text(encoding="utf-8", errors="ignore"))
            total += len(parts[-1])
    return "".join(parts)[:size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--mb", type=float, default=10.0, help="millions of characters of each text at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    size = int(given.mb * 1e6)
    texts = {file.name: file.read_text(encoding="utf-8", errors="ignore")[:size] for file in given.files}
    texts = texts or {"Python sources": python_sources(size)}
    world = load_tokenizer("world")
    try:
        from pyrwkv_tokenizer import RWKVTokenizer
    except ImportError:
        raise SystemExit("the baseline is missing: pip install pyrwkv-tokenizer") from None
    rust = RWKVTokenizer()
    rows = []
    for name, text in texts.items():
        documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        for form, parts in (("one text", [text]), ("documents", documents)):
            rows.append({"text": name, "form": form} | measure(world, rust, parts, given.rounds))
    loading = interleaved({"load": lambda: load_tokenizer("world")}, rounds=given.rounds)
    rows.append({"text": "(load the vocabulary)", "milliseconds": loading.median("load") * 1e3})
    report("tokenizer", rows, Machine(threads=1), save=given.save)


def measure(world, rust, parts: list[str], rounds: int) -> dict:
    assert all(world.encode(part) == list(rust.encode(part)) for part in parts), "the two disagree"
    calls = {
        OURS: lambda: [world.encode(part) for part in parts],
        RUST: lambda: [rust.encode(part) for part in parts],
        "array": lambda: [world.encode_array(part) for part in parts],
    }
    seconds: Seconds = interleaved(calls, rounds=rounds)
    megabytes = sum(len(part.encode("utf-8")) for part in parts) / 1e6
    low, high = seconds.spread(RUST, OURS)
    return {
        "MB": megabytes,
        "MB/s": {name: megabytes / seconds.median(name) for name in calls},
        "times as fast": seconds.ratio(RUST, OURS),
        "spread": f"{low:.2f}-{high:.2f}",
    }


if __name__ == "__main__":
    main()
