"""What quantised weights cost: bits per byte, KL divergence and top-1 agreement against bfloat16, on trained models.

    python benchmarks/quality.py [--data DIR] [--tokens 1500] [--save]

Models are the embedded one and those trained ones that DIR/models has; texts are pieces of DIR/text (three English
sources) and, for the embedded model, stories that it tells itself (seeds 0 to 5). Formats are those of the runtime and
those of llama.cpp of the same size: Q8_0 and Q4_0 by the `gguf` package, on the same tensors, run by the same kernels;
"Q4_0, head Q8_0" is what our int4 is to be compared with, since its head has 8 bits. KL divergence is that of the
format's next-token distribution from the reference's, in nats, the mean over all tokens. "zeros" is the share of hidden
units of the channel mix that are zero, and need not be read, when tokens come one by one.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from support import Machine, report

from rookery import LLM
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.checkpoint import Checkpoint
from rookery.checkpoints.pack import plan
from rookery.checkpoints.source import Packed, Stored
from rookery.engine.llm import EMBEDDED
from rookery.engine.runners.native import NativeRunner

TEXTS = ("tinyshakespeare.txt", "c4_demo.jsonl", "wikitext2_valid.txt")
STORIES = 6
TRAINED = ("rwkv_cpp/tiny-rwkv-4v0-660K-FP32.bin", "rwkv_cpp/tiny-rwkv-5v2-730K-FP32.bin")
TRAINED += ("rwkv_cpp/tiny-rwkv-7v0-834K-FP32.bin",)
Runners = Mapping[str, Callable[[Checkpoint], NativeRunner]]


def blocks(checkpoint: Checkpoint, kind: str, head: str | None = None) -> NativeRunner:
    """The model with the large matrices as llama.cpp's "Q8_0" or "Q4_0"."""
    tensors = dict(checkpoint.tensors)
    for name in plan(checkpoint, "int8"):
        tensor, own = tensors[name], head if head and name == "head.weight" else kind
        if tensor.shape[-1] % 32 == 0:
            tensors[name] = as_blocks(tensor, own)
    return NativeRunner(replace(checkpoint, tensors=tensors))


def as_blocks(tensor: Stored, kind: str) -> Stored:
    which = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(np.ascontiguousarray(tensor.read(), np.float32), which)
    native = Packed(kind.lower(), "blocks", lambda: packed)
    values = lambda: gguf.quants.dequantize(packed, which)  # noqa: E731
    return replace(tensor, read=values, encoding=kind, nbytes=packed.nbytes, packed=native)


FORMATS: Runners = {
    "bfloat16": lambda model: NativeRunner(model, dtype="bfloat16"),
    "int8": lambda model: NativeRunner(model, quantize="int8"),
    "Q8_0": lambda model: blocks(model, "Q8_0"),
    "int4": lambda model: NativeRunner(model, quantize="int4"),
    "Q4_0, head Q8_0": lambda model: blocks(model, "Q4_0", head="Q8_0"),
    "Q4_0": lambda model: blocks(model, "Q4_0"),
}


def read_text(path: Path) -> str:
    """The beginning of a text file, or the texts of a .jsonl file one after the other."""
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return "\n\n".join(json.loads(line)["text"] for _, line in zip(range(20), file))
        return re.sub(r"\n\s*\n+", "\n\n", file.read(40000))


def log_probabilities(runner: NativeRunner, ids: list[int]) -> np.ndarray:
    logits = runner.forward(ids, runner.init_state(), "all").astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measure(name: str, checkpoint: Checkpoint, texts: Mapping[str, tuple[list[int], int]]) -> list[dict]:
    """One row for each format and text; texts are token ids and the bytes that all but the first stand for."""
    rows, exact = [], {}
    sizes = {n: int(np.prod(checkpoint.tensors[n].shape)) for n in plan(checkpoint, "int8")}
    bits = {"int8": 8.25, "q8_0": 8.5, "int4": 4.5, "q4_0": 4.5, "bfloat16": 16, "float16": 16, "float32": 32}
    for format, load in FORMATS.items():
        runner = load(checkpoint)
        weight = sum(bits[runner.formats[n]] * size for n, size in sizes.items()) / sum(sizes.values())
        for text, (ids, nbytes) in texts.items():
            found = log_probabilities(runner, ids)
            reference = exact.setdefault(text, found)
            nats = -found[np.arange(len(ids) - 1), ids[1:]].sum()
            rows.append(
                {
                    "model": name,
                    "text": text,
                    "format": format,
                    "bits a weight": weight,
                    "bits per byte": nats / np.log(2) / nbytes,
                    "KL": (np.exp(reference) * (reference - found)).sum(-1).mean(),
                    "top-1": (reference.argmax(-1) == found.argmax(-1)).mean(),
                }
            )
        state = runner.init_state()
        before = runner._model.ffn_reads
        for token in next(iter(texts.values()))[0][:200]:
            runner.forward([token], state, "none")
        read, there = (now - then for now, then in zip(runner._model.ffn_reads, before))
        for row in rows[-len(texts) :]:
            row["zeros"] = 1 - read / there
    return rows


def embedded(data: Path, count: int) -> list[dict]:
    llm = LLM()
    stories = [llm.generate("Once upon a time", 400, temperature=1.0, seed=seed) for seed in range(STORIES)]
    texts = {"own stories": "\n\n".join("Once upon a time" + story for story in stories)}
    texts |= {name: read_text(data / "text" / name) for name in TEXTS if (data / "text" / name).exists()}
    pieces = {}
    for name, text in texts.items():
        ids = llm.tokens_of(text)[:count]
        pieces[name] = ids, len(llm.tokenizer.decode(ids[1:]).encode())
    return measure("embedded, 4.5 M", open_checkpoint(EMBEDDED), pieces)


def trained(data: Path, count: int) -> list[dict]:
    """The byte models of rwkv.cpp's tests."""
    rows = []
    for name in TRAINED:
        path = data / "models" / name
        if path.exists():
            checkpoint = open_checkpoint(path)
            ids = list(read_text(data / "text" / TEXTS[1]).encode()[:count])
            rows += measure(path.stem.replace("-FP32", ""), checkpoint, {TEXTS[1]: (ids, len(ids) - 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with text/ and models/")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = embedded(given.data, given.tokens) + trained(given.data, given.tokens)
    report("quality", rows, Machine(threads=1), save=given.save)


if __name__ == "__main__":
    main()
