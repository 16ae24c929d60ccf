"""Claims of papers, tried at the size of one machine. `REPRODUCTIONS` is what `rookery reproduce NAME` knows.

A reproduction is a file here that defines `REPRODUCTION`; see `rookery.reproduce.base`. Listing them imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rookery.errors import unknown

if TYPE_CHECKING:
    from rookery.reproduce.base import Reproduction

REPRODUCTIONS: dict[str, str] = {
    "rwkv-families": "RWKV-7 against 6, 5, 4 and a GPT of the same size on the same text",
    "state-tracking": "products of permutations (S5) across the families, with the stock and the wide eigenvalues",
    "recall": "associative recall across the families",
    "rwkv-clip": "RWKV-CLIP against two transformers: emoji of an unseen vendor by their names",
    "vision-rwkv": "Vision-RWKV against a ViT of its size on small pictures, with and without its shift",
    "arwkv": "a transformer turned into RWKV: with its projections, with new mixers, from nothing",
    "dir-7": "pictures that follow a text: CrossWKV in its forms against cross-attention; S5 told in words",
    "rwkv-lite": "memory and quality of compressed models, technique by technique",
    "wuneng": "overwritten recall and state tracking: attention heads, state heads, both, and WuNeng's parts",
    "based": "recall against the bytes of the state: BASED's features and window, RWKV-7, attention",
    "bone": "MiSS and BAT (once Bone) against LoRA, PiSSA, DoRA, all weights and the start state",
    "rwkv-x": "a passkey far beyond the training length, with sparse attention on top of RWKV-7 and without",
    "rimer": "RWKV-7 on time series against a transformer of its size, DLinear and naive forecasts",
    "state-tuning": "tuned start states: plain, kernel-upscaled, decorrelated, and at test time",
    "meta-state": "a second reading of the state, and growth against training from scratch",
    "goldfinch": "attention on one compressed cache against a hybrid that keeps everything, and RWKV-6",
    "temporal-perspectives": "mixing vectors once or four times, fine-tuned for another domain, with and without head",
    "rrwkv": "how far back RWKV-4 looks with mediums, and what each use of them is worth",
}
"""Name -> what is compared; the file of the same name, with underscores, defines REPRODUCTION."""


def reproduction(name: str) -> Reproduction:
    """The reproduction of that name."""
    if name not in REPRODUCTIONS:
        raise unknown("reproduction", name, REPRODUCTIONS, "`rookery reproduce --list`")
    return importlib.import_module(f"rookery.reproduce.{name.replace('-', '_')}").REPRODUCTION
