"""Adapters in another form that does the same: MiSS, Bone and DiSHA as LoRA or under peft's present name for them.

MiSS adds row i mod r of D [r, out] to every column i. That is a LoRA with alpha = r whose B is Dᵀ and whose A [r, in]
is fixed, 1 where i mod r = j (adaptation.md C.2.1): programs that know LoRA alone can serve it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints.adapter import FILES, SETTINGS, SHARED, Adapter, read_adapter
from rookery.checkpoints.atomic import replacing_folder
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.checkpoints.safetensors import write_safetensors
from rookery.errors import unknown

TARGETS = ("lora", "miss")
PREFIX = "base_model.model."
BLOCK = re.compile(r"((?:.*\.)?(?:blocks|layers))\.\d+\.(.+)")


def convert_adapter(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], to: str, *, base: str | os.PathLike[str] = ""
) -> Path:
    """Writes the adapter `source` as a folder of peft, of kind "lora" or "miss"; gives the folder.

    A LoRA is as wide as the weights: `base`, the model that the adapter is for, tells how wide. BadCheckpoint where the
    adapter cannot have that form.
    """
    if to not in TARGETS:
        raise unknown("kind of adapter", to, TARGETS, "`rookery convert --help`")
    adapter = read_adapter(source)
    named = {module: _shared(adapter, module, factors) for module, factors in adapter.factors.items()}
    if adapter.whole:
        raise adapter.fail("it has tensors that were trained whole, which no other form of an adapter holds: merge it")
    if to == "lora":
        tensors, settings = _as_lora(adapter, named, base)
    else:
        tensors, settings = _as_miss(adapter, named)
    shared = {
        "target_modules": _pattern(adapter, list(named)),
        "base_model_name_or_path": adapter.settings.get("base_model_name_or_path") or os.fspath(base),
        "inference_mode": True,
        "bias": "none",
    }
    target = Path(folder)
    with replacing_folder(target) as made:
        write_safetensors(made / FILES[0], {PREFIX + name: t for name, t in tensors.items()}, {"format": "pt"})
        (made / SETTINGS).write_text(json.dumps(settings | shared, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def _shared(adapter: Adapter, module: str, factors: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Name and values of a module's one block."""
    if len(factors) != 1 or next(iter(factors)) not in SHARED:
        raise adapter.fail(
            f"{module}: its tensors {', '.join(factors)} are no MiSS, Bone or DiSHA, which alone convert"
        )
    name, tensor = next(iter(factors.items()))
    return name, tensor.read()


def _as_lora(
    adapter: Adapter, named: Mapping[str, tuple[str, np.ndarray]], base: str | os.PathLike[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not base:
        raise ValueError("a LoRA is as wide as the weights: name the model that the adapter is for with --base")
    shapes, tensors, rank = open_checkpoint(base).shapes, {}, 0
    for module, (name, block) in named.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise adapter.fail(f"the model {os.fspath(base)!r} has no {module}.weight")
        if block.ndim != 2:
            raise adapter.fail(f"{module}: BAT multiplies the weights, which no LoRA does: merge it")
        if name in ("bone", "disha") and block.shape[1] != shape[0] == block.shape[0]:
            block = block.T  # the oldest files
        try:
            rules.check_shards(shape, block.shape)
        except rules.Misfit as misfit:
            raise adapter.fail(f"{module}: {misfit}") from None
        rank, (outputs, inputs) = block.shape[0], shape
        fixed = (np.arange(inputs) % rank == np.arange(rank)[:, None]).astype(np.float32)
        tensors[f"{module}.lora_A.weight"] = fixed
        columns = np.tile(block.astype(np.float32), (1, outputs // block.shape[1]))
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(columns.T)
    return tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}


def _as_miss(
    adapter: Adapter, named: Mapping[str, tuple[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same numbers under peft's present name."""
    tensors, kinds, settings = {}, set(), adapter.settings
    for module, (name, block) in named.items():
        if block.ndim == 3 and not SHARED[name]:
            raise adapter.fail(
                f"{module}: RWKV-PEFT's BAT shares its blocks along the other axis than peft's: merge it instead"
            )
        kinds.add("bat" if block.ndim == 3 else settings.get("init_weights") if name == "miss_block" else True)
        tensors[f"{module}.miss_block"] = np.ascontiguousarray(block)
    if len(kinds) != 1:
        raise adapter.fail("its blocks are of different kinds, which peft cannot hold together")
    kind, first = kinds.pop(), next(iter(tensors.values()))
    own = {"peft_type": "MISS", "r": first.shape[1 if kind == "bat" else 0], "init_weights": kind, "miss_dropout": 0.0}
    return tensors, own | {"mini_r": settings.get("mini_r", 1)}


def _pattern(adapter: Adapter, modules: list[str]) -> str:
    """A regular expression for these modules."""
    found = [BLOCK.fullmatch(module) for module in modules]
    if not all(found):
        raise adapter.fail(f"{modules[0]} is no part of a block")
    inner = "|".join(sorted({re.escape(match[2]) for match in found}))
    return rf"{re.escape(found[0][1])}\.\d+\.({inner})"
