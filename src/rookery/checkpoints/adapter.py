"""Adapters merged into the model that they were trained on: files of RWKV-PEFT and folders of Hugging Face's peft.

RWKV-PEFT writes one `.pth`: `blocks.0.att.key.lora_A`, `.lora_B`, `.disha` or `.bone`, and small weights that were
trained whole; its LoRA's alpha is not in the file, its PiSSA needs `init_pissa.pth` beside it. peft writes
adapter_config.json and adapter_model.safetensors with names that begin with `base_model.model.` (adaptation.md C.3).
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints import hub
from rookery.checkpoints.checkpoint import Checkpoint
from rookery.checkpoints.detect import read_file
from rookery.checkpoints.layout import from_foreign, to_foreign
from rookery.checkpoints.parts import ADAPTERS
from rookery.checkpoints.source import Stored, short
from rookery.checkpoints.tuned_state import states_among
from rookery.errors import BadCheckpoint

log = logging.getLogger("rookery")

FILES = ("adapter_model.safetensors", "adapter_model.bin")
SETTINGS = "adapter_config.json"
FIRST_PAIR = "init_pissa.pth"
"""Where RWKV-PEFT keeps the factors that PiSSA took out of the weights before training."""
WRAPPED = ("base_model.model.", "base_model.", "model.base_model.model.")
INSIDE = ("model.blocks.", "model.emb.", "model.ln_out.", "model.head.", "model.model.", "model.lm_head.")
"""How names begin where the model was wrapped for transformers (`rookery.hf`): one "model." more."""
HELD = "adapters"
"""In a model's metadata: the digests of adapters that are merged into it."""
SHARED = {"miss_block": True, "bone_block": True, "bone": True, "disha": False}
"""Name of a factor that is shared among blocks -> whether its form [n, r, r] is per row of blocks, else per column.

The two forms are told by nothing but the program that wrote the file (adaptation.md C.2.3, C.2.4).
"""
KNOWN = {f"{first}lora_{side}" for first in ("", "init_") for side in "AB"} | {"lora_magnitude_vector"}
KNOWN |= {"lora_embedding_A", "lora_embedding_B"}
Change = Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """A read adapter, not yet tied to a model."""

    path: str
    factors: Mapping[str, dict[str, Stored]]
    """Module ("blocks.0.att.key") -> its factors."""
    whole: Mapping[str, Stored]
    """Tensors that were trained whole and replace those of the same name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """adapter_config.json, empty for files of RWKV-PEFT."""
    alpha: float | None = None
    """LoRA's alpha where the caller names it."""

    def fail(self, why: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path!r}: {why}")

    def scale(self, module: str, rank: int) -> float:
        """What B·A is multiplied by: alpha / rank, or alpha / √rank."""
        settings = self.settings
        alpha = self.alpha if self.alpha is not None else settings.get("lora_alpha")
        for pattern, special in (settings.get("alpha_pattern") or {}).items():
            alpha = special if module == pattern or module.endswith("." + pattern) else alpha
        if not isinstance(alpha, int | float):
            raise self.fail(
                "the file does not say the alpha of its LoRA; name it with --adapter-alpha (adapter_alpha=; --alpha of "
                "`rookery merge`): what RWKV-PEFT was given as lora_alpha, 32 unless changed. A PiSSA needs "
                "init_pissa.pth beside it instead"
            )
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def read_adapter(path: str | os.PathLike[str], *, alpha: float | None = None) -> Adapter:
    """The adapter in a file, a folder of peft or a Hub id; BadCheckpoint where it is none, or cannot be merged."""
    path = hub.local(path)
    where, folder = os.fspath(path), Path(path)
    file = folder
    if folder.is_dir():
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise BadCheckpoint(f"{where!r} is no folder of an adapter: it has none of {', '.join(FILES)}")
    settings = _settings(file.with_name(SETTINGS)) if file.name in FILES else {}
    tensors = dict(read_file(file).tensors)
    first = file.with_name(FIRST_PAIR)
    if first.is_file() and file.name not in FILES:
        tensors |= read_file(first).tensors
    factors, whole = _sorted(tensors)
    adapter = Adapter(where, factors, whole, settings, alpha)
    if not factors:
        raise adapter.fail("this is no adapter: no tensor is named like 'blocks.0.att.key.lora_A' or '.disha'")
    taken_out = str(settings.get("init_lora_weights", "")).lower()
    if taken_out.startswith(("pissa", "olora", "corda", "loftq")):
        raise adapter.fail(
            f"its init_lora_weights {taken_out!r} changed the base model's weights before training; save it with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…), which gives a plain LoRA"
        )
    if settings.get("fan_in_fan_out"):
        raise adapter.fail("it is for weights stored [in, out] (fan_in_fan_out), which no RWKV model has")
    return adapter


def adapted(
    checkpoint: Checkpoint,
    adapter: Adapter | str | os.PathLike[str],
    *,
    alpha: float | None = None,
    undo: bool = False,
    sequential: bool = False,
) -> Checkpoint:
    """`checkpoint` with the adapter merged into its weights as they are read; BadCheckpoint for another base.

    `alpha` is that of a LoRA whose file does not say it. Merged weights keep the precision of the base. With `undo` the
    adapter is taken out of the weights again, up to what their precision kept. A model that holds the adapter already
    is refused; so is BAT in a model that holds another one, which makes a difference to it, unless `sequential`.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, alpha=alpha)
    own = digest_of(adapter)
    held = _held(checkpoint, adapter, own, undo=undo, sequential=sequential)
    states = states_among(adapter.whole)
    tensors = _in_names_of(adapter, checkpoint)
    changed: dict[str, Stored] = {}
    for module, factors in adapter.factors.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise adapter.fail(f"{_other_base(adapter, checkpoint)}: that one has no {short(name)}")
        changed[name] = _merged(tensors[name], module, factors, adapter, checkpoint, undo=undo)
    for name, tensor in adapter.whole.items():
        if name not in states:
            changed[name] = _replaced(name, tensor, tensors, adapter, checkpoint)
    official = _official(checkpoint, tensors | changed)
    fingerprint = fingerprint_with(checkpoint.fingerprint(), own)
    metadata = {**checkpoint.metadata, "fingerprint": fingerprint, HELD: ",".join(held)}
    if undo:
        del metadata["fingerprint"]  # that of the weights as they are, which is the base's
    kept = {**checkpoint.kept, **states}
    log.info("%s: %d weights changed by %s", checkpoint.path, len(changed), adapter.path)
    return replace(checkpoint, tensors=official, metadata=metadata, kept=kept, unused=tuple(kept), lite={})


def _held(checkpoint: Checkpoint, adapter: Adapter, own: str, *, undo: bool, sequential: bool) -> list[str]:
    """What the model will hold, by `digest_of`; BadCheckpoint where it must not be merged, or cannot be taken out."""
    marked = HELD in checkpoint.metadata
    held = [mark for mark in checkpoint.metadata.get(HELD, "").split(",") if mark]
    if undo:
        if adapter.whole:
            raise adapter.fail(f"{short(next(iter(adapter.whole)))} was trained whole: what was there before is gone")
        if marked and own not in held:
            raise adapter.fail(f"{checkpoint.path!r} does not hold this adapter; it cannot be taken out")
        if not marked:
            log.warning("%s does not say which adapters it holds; %s is taken out all the same", checkpoint.path, own)
        return [mark for mark in held if mark != own]
    if own in held:
        raise adapter.fail(
            f"{checkpoint.path!r} holds this adapter already: merged again it would count twice; take the model that "
            "it was trained on"
        )
    bat = any(len(factor.shape) == 3 for factors in adapter.factors.values() for factor in factors.values())
    if held and bat and not sequential:
        raise adapter.fail(
            f"{checkpoint.path!r} holds another adapter, and BAT multiplies what it finds: the order matters. Merge it "
            "first, or say that this order is meant with --allow-sequential (sequential=True)"
        )
    return [*held, own]


def digest_of(adapter: Adapter) -> str:
    """Names an adapter by its numbers and its strength."""
    strength = [adapter.alpha, adapter.settings.get("lora_alpha")]
    strength += [adapter.settings[key] for key in ("use_rslora", "alpha_pattern") if adapter.settings.get(key)]
    digest = hashlib.sha256(" ".join(map(str, strength)).encode())
    tensors = {f"{m}.{name}": t for m, factors in adapter.factors.items() for name, t in factors.items()}
    for name, tensor in sorted((tensors | dict(adapter.whole)).items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor.read()).tobytes())
    return digest.hexdigest()[:16]


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{str(path)!r} is damaged: it is not JSON") from None
    if not isinstance(settings, dict):
        raise BadCheckpoint(f"{str(path)!r} is damaged: it is not a JSON table")
    return settings


def _sorted(tensors: Mapping[str, Stored]) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Factors by module, and tensors trained whole."""
    factors: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        name = next((name.removeprefix(prefix) for prefix in WRAPPED if name.startswith(prefix)), name)
        name = name.removeprefix("model.") if name.startswith(INSIDE) else name
        parts = [part for part in name.split(".") if part not in ("default", "base_layer", "modules_to_save")]
        stem = parts[:-1] if parts[-1] == "weight" else parts
        last = stem[-1]
        plain = last.removeprefix("init_")
        if plain in SHARED or plain.startswith("lora_") or ADAPTERS.search("." + plain):
            factors.setdefault(".".join(stem[:-1]), {})[last] = tensor
        else:
            whole[".".join(parts)] = tensor
    return factors, whole


def _in_names_of(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Stored]:
    """The base's tensors under the names that the adapter uses: official, or those of a layout of the family."""
    names = [f"{module}.weight" for module in adapter.factors]
    official = dict(checkpoint.tensors)
    if any(name in official for name in names):
        return official
    for layout in checkpoint.family.layouts.values():
        foreign = to_foreign(layout, official)
        if any(name in foreign for name in names):
            return foreign
    raise adapter.fail(f"{_other_base(adapter, checkpoint)}: that one has no {short(names[0])}")


def _official(checkpoint: Checkpoint, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    if all(name in tensors for name in checkpoint.tensors):
        return {name: tensors[name] for name in checkpoint.tensors}
    for layout in checkpoint.family.layouts.values():
        back = from_foreign(layout, tensors)
        if all(name in back for name in checkpoint.tensors):
            return {name: _reshaped(back[name], tensor.shape) for name, tensor in checkpoint.tensors.items()}
    raise AssertionError("names that a layout gave lead back")


def _reshaped(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    return tensor if tensor.shape == shape else replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape))


def _merged(
    base: Stored, module: str, factors: Mapping[str, Stored], adapter: Adapter, checkpoint: Checkpoint, *, undo: bool
) -> Stored:
    """The weight with the adapter in it, or without it again, computed when it is read."""
    try:  # shapes are compared now, not when a long conversion has come to this weight
        change = _rule(base.shape, module, factors, adapter, undo=undo)
    except rules.Misfit as misfit:
        raise adapter.fail(f"{_other_base(adapter, checkpoint)}: {module}: {misfit}") from None

    def read() -> np.ndarray:
        values = {name: tensor.read().astype(np.float32) for name, tensor in factors.items()}
        return change(base.read().astype(np.float32), values).astype(base.dtype)

    return Stored(base.shape, base.dtype, read, base.dtype.name, base.nbytes)


def _rule(shape: rules.Shape, module: str, factors: Mapping[str, Stored], adapter: Adapter, *, undo: bool) -> Change:
    """What the factors do to a weight of this shape; Misfit where they cannot belong to it."""
    shapes = {name: tensor.shape for name, tensor in factors.items()}
    if len(shape) != 2:
        raise rules.Misfit(f"the weight has shape {list(shape)}, adapters change matrices")
    shared = [name for name in shapes if name in SHARED]
    if shared and len(shapes) == 1:
        name = shared[0]
        if len(shapes[name]) == 2:
            turned = rules.is_turned(shape, shapes[name], name)
            rules.check_shards(shape, shapes[name][::-1] if turned else shapes[name])
            return lambda weight, values: rules.shards(weight, values[name].T if turned else values[name], undo=undo)
        if len(shapes[name]) == 3:
            rules.check_blocks(shape, shapes[name], by_rows=SHARED[name])
            if undo:
                rules.check_inverse(factors[name].read())
                return lambda weight, values: rules.without_affine_blocks(weight, values[name], by_rows=SHARED[name])
            return lambda weight, values: rules.affine_blocks(weight, values[name], by_rows=SHARED[name])
    if "bone_A" in shapes or "bone_B" in shapes:
        by_rows = rules.check_two_blocks(shape, shapes)
        if undo:
            rules.check_inverse(factors["bone_A"].read())
        turn = rules.without_affine_blocks if undo else rules.affine_blocks
        return lambda weight, values: turn(weight, values["bone_A"], values["bone_B"], by_rows=by_rows)
    if any(name not in KNOWN for name in shapes):
        raise rules.Misfit(f"its tensors {', '.join(map(short, shapes))} are of no kind that is known")
    if "lora_embedding_A" in shapes or "lora_embedding_B" in shapes:
        rules.check_table(shape, shapes)
        scale = adapter.scale(module, shapes["lora_embedding_A"][0])
        return partial(rules.table, scale=scale, undo=undo)
    rules.check_low_rank(shape, shapes)
    if undo and "lora_magnitude_vector" in shapes:
        raise rules.Misfit("DoRA forgets the length of the rows that it found: what was there before is gone")
    scale = 1.0 if "init_lora_A" in shapes else adapter.scale(module, shapes["lora_A"][0])
    return partial(rules.low_rank, scale=scale, undo=undo)


def _replaced(
    name: str, tensor: Stored, tensors: Mapping[str, Stored], adapter: Adapter, checkpoint: Checkpoint
) -> Stored:
    """A tensor that was trained whole, in the shape and type of the base's."""
    base = tensors.get(name)
    if base is None:
        raise adapter.fail(f"{_other_base(adapter, checkpoint)}: that one has no {short(name)}")
    if math.prod(tensor.shape) != math.prod(base.shape):
        raise adapter.fail(
            f"{_other_base(adapter, checkpoint)}: {short(name)} has shape {list(tensor.shape)}, that one's "
            f"{list(base.shape)}"
        )
    return replace(base, read=lambda: tensor.read().reshape(base.shape).astype(base.dtype), packed=None)


def _other_base(adapter: Adapter, checkpoint: Checkpoint) -> str:
    named = adapter.settings.get("base_model_name_or_path")
    trained = f" (it names {short(named)})" if named else ""
    config = checkpoint.config
    sizes = f"{checkpoint.family.name}, {config.num_hidden_layers} layers of width {config.hidden_size}"
    return f"the adapter was trained on another model{trained} than {checkpoint.path!r} ({sizes})"


def fingerprint_with(base: str, adapter: str) -> str:
    """Names the model of fingerprint `base` with the adapter of this digest, merged or beside it.

    The states of one are not those of the other.
    """
    return hashlib.sha256(f"{base} {adapter}".encode()).hexdigest()[:32]
