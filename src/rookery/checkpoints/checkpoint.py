"""Opens any readable model file: what it is, and its tensors under their official names."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rookery.checkpoints.detect import read_file
from rookery.checkpoints.folder import read_folder
from rookery.checkpoints.gguf import ARCHITECTURES
from rookery.checkpoints.layout import from_foreign
from rookery.checkpoints.parts import explain_part
from rookery.checkpoints.safetensors import CONVENTION
from rookery.checkpoints.source import Source, Stored, short
from rookery.checkpoints.state_file import fingerprint
from rookery.checkpoints.tuned_state import states_among
from rookery.errors import BadCheckpoint, UnknownName, unknown
from rookery.families.base import Family
from rookery.registry import families_in_order, recognise

log = logging.getLogger("rookery")

ONLY_LAYOUT = {"ggmf": "ggmf", "gguf": "gguf"}
"""Formats whose files have one naming scheme; any other may hold official names or a foreign scheme."""


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, np.ndarray]):
    """A model file. As a mapping: official tensor name -> its values, read (or only mapped) when asked for."""

    path: str
    """Where it was opened."""
    format: str
    """File format: "pth", "safetensors", "ggmf"."""
    layout: str
    """Naming scheme of the tensors: "official", or the name of a layout of the family ("fla", "ggmf")."""
    family: Family
    """The family that the tensors belong to."""
    config: Any
    """The family's config, read off the tensors (and the metadata of our own files)."""
    metadata: Mapping[str, str]
    """What the file says about itself."""
    tensors: Mapping[str, Stored]
    """Official name -> tensor, in the family's order and with the family's shapes."""
    unused: tuple[str, ...] = ()
    """Tensors that the file carries and the model does not use."""
    kept: Mapping[str, Stored] = field(default_factory=dict)
    """These tensors themselves, for whoever writes the model again."""
    lite: Mapping[str, Stored] = field(default_factory=dict)
    """The tensors of a compressed model as the file has them (see `lite`); the others are the plain model's."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Official name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Official name -> type of the numbers; float32 for quantised tensors, which are read as such."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def dtype(self) -> np.dtype:
        """The type that most of the numbers have."""
        counts: dict[np.dtype, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    def fingerprint(self) -> str:
        """Names the model in state files: what the metadata say, else what `state_file.fingerprint` computes."""
        stated = self.metadata.get("fingerprint")
        return stated if stated else self.computed_fingerprint()

    def computed_fingerprint(self) -> str:
        """The fingerprint of the weights as they are in this file."""
        embedding, final_norm = self.family.fingerprinted
        return fingerprint(self.family.name, self.config, self[embedding][:16], self[final_norm])


def open_checkpoint(path: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None) -> Checkpoint:
    """The model in a file, a folder or on the Hub, whatever its format; BadCheckpoint says what is wrong.

    `settings` are fields of the family's config that neither the file nor its tensors tell, as {"bits": 4} for a 4-bit
    ROSA model; they win over what was guessed. UnknownName for a field that the config does not have.

    Nothing that a file contains is executed. Tensors missing, unknown or of the wrong shape for the family are refused
    by name. A path that is not there and looks like "owner/name" is a model on the Hugging Face Hub: see `hub`.
    """
    if not os.path.exists(path):
        from rookery.checkpoints import hub

        path = hub.local(path)
    where = os.fspath(path)
    source = read_folder(path) if os.path.isdir(path) else with_sidecar(read_file(path), where)
    if settings:  # some sizes can only be read off tensors together with what is told
        source = replace(source, hints={**source.hints, **settings})
    try:
        checkpoint = _understood(source, where)
        return _told(checkpoint, settings) if settings else checkpoint
    except UnknownName:
        raise
    except BadCheckpoint as refused:
        raise BadCheckpoint(_placed(str(refused), where)) from None
    # names and sizes come from the file: a family's rules may stumble over any of them
    except (ValueError, LookupError, TypeError, ArithmeticError) as damage:
        raise BadCheckpoint(
            f"{where!r}: its tensors make no model ({type(damage).__name__}: {short(damage)})"
        ) from None


def _told(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """`checkpoint` with these fields of its config; BadCheckpoint where its tensors contradict."""
    family, known = checkpoint.family, [f.name for f in fields(checkpoint.config)]
    for name in settings:
        if name not in known:
            raise unknown("setting", name, known, f"{family.config.__name__}")
    config = replace(checkpoint.config, **settings)
    wanted = family.tensor_shapes(config)
    idle = {name: tensor for name, tensor in checkpoint.kept.items() if name in wanted}
    tensors = _fitted(family, config, {**checkpoint.tensors, **idle})
    kept = {name: tensor for name, tensor in checkpoint.kept.items() if name not in tensors}
    return replace(checkpoint, config=config, tensors=tensors, kept=kept, unused=tuple(kept))


def with_sidecar(source: Source, where: str) -> Source:
    """`source` with the metadata of PATH.json, which `convert` writes beside files that cannot carry any."""
    sidecar = Path(where + ".json")
    if "rookery" in source.metadata or not sidecar.is_file():
        return source
    try:
        beside = json.loads(sidecar.read_bytes())
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{str(sidecar)!r}, which describes the model, is not JSON; remove it") from None
    if not isinstance(beside, dict) or "rookery" not in beside:
        return source
    told = {key: value for key, value in beside.items() if isinstance(value, str)}
    if told.pop("bytes", None) != str(os.path.getsize(where)):
        log.warning("%s describes another file than %s and is not used; remove it", sidecar, where)
        return source
    return replace(source, metadata={**source.metadata, **told})


def _understood(source: Source, where: str) -> Checkpoint:
    if source.metadata.get("format", "").startswith("rookery-state"):
        raise BadCheckpoint("this is the state of a model, not a model")
    if part := explain_part(source.tensors, where):
        raise BadCheckpoint(part)
    layout, tensors, family = _named_officially(source)
    states = states_among(tensors)
    used = {name: tensor for name, tensor in tensors.items() if not family.is_unused(name) and name not in states}
    kept = {name: tensor for name, tensor in tensors.items() if name not in used}
    config = _config(family, source, used, layout)
    fitted = _fitted(family, config, used)
    kept |= {name: tensor for name, tensor in used.items() if name not in fitted}
    return Checkpoint(
        where, source.format, layout, family, config, source.metadata, fitted, tuple(kept), kept, source.lite
    )


def _named_officially(source: Source) -> tuple[str, dict[str, Stored], Family]:
    """Naming scheme, tensors under official names, and their family."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    only = ONLY_LAYOUT.get(source.format)
    if only is None:
        for family in families_in_order():
            if family.recognise(shapes):
                return "official", dict(source.tensors), family
    for family in families_in_order():
        for name, layout in family.layouts.items():
            if name != only and (only is not None or name in ONLY_LAYOUT.values()):
                continue
            if source.format == "gguf" and ARCHITECTURES[source.metadata["general.architecture"]] != family.name:
                continue  # several families have tensors of one name there
            try:
                tensors = from_foreign(layout, source.tensors)
            except (LookupError, ValueError):  # another family's tensors under the same name: a stack of another size
                continue
            if family.recognise({name: tensor.shape for name, tensor in tensors.items()}):
                return name, tensors, family
    if only is None:
        recognise(shapes)  # says what is wrong
    some = ", ".join(map(short, list(shapes)[:3]))
    raise BadCheckpoint(f"no registered family reads {source.format} files with these tensors ({some} …)")


def _config(family: Family, source: Source, tensors: Mapping[str, Stored], layout: str) -> Any:
    """The config: our own metadata where there are any, else the tensors, with hints that the tensors confirm."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    stated = source.metadata.get("rookery")
    if stated is not None:
        return _own_config(family, source.metadata, len(shapes))
    hints = _usable(source.hints, family)
    config = family.config_from_shapes(shapes, **{key: hints[key] for key in family.not_in_shapes if key in hints})
    _check_depth(config, len(shapes))
    if layout != "official":
        config = replace(config, **family.layouts[layout].config)
    for wrong in (None, *hints):  # config files that are right but for one entry are common
        try:
            hinted = replace(config, **{key: value for key, value in hints.items() if key != wrong})
            _check_depth(hinted, len(shapes))
            _fitted(family, hinted, tensors)
        except (ValueError, ArithmeticError):
            continue
        return hinted
    return config


def _usable(hints: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Entries of a config file that are fields of the family's config, and of their type."""
    kinds = {f.name: type(f.default) for f in fields(family.config)}
    usable = {key: value for key, value in hints.items() if key in kinds and type(value) is kinds[key]}
    optional = {f.name for f in fields(family.config) if type(None) in get_args(f.type)}
    usable |= {key: None for key, value in hints.items() if value is None and key in optional}
    whole = {key: float(value) for key, value in hints.items() if kinds.get(key) is float and type(value) is int}
    return usable | whole


def _own_config(family: Family, metadata: Mapping[str, str], tensors: int) -> Any:
    if metadata["rookery"] != CONVENTION:
        raise BadCheckpoint(f"written by a newer rookery ({metadata['rookery']!r}); this one reads {CONVENTION!r}")
    if metadata.get("family") != family.name:
        raise BadCheckpoint(f"the metadata say {metadata.get('family')!r}, its tensors are those of {family.name}")
    try:
        settings = json.loads(metadata.get("config", ""))
        known = {f.name: type(f.default) for f in fields(family.config)}
        if any(isinstance(value, bool) != (known[key] is bool) for key, value in settings.items()):
            raise TypeError
        config = family.config(**settings)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        raise BadCheckpoint("the config in its metadata cannot be read by this version") from None
    _check_depth(config, tensors)
    return config


def _check_depth(config: Any, tensors: int) -> None:
    # "blocks.999999999.x" must not make us list the tensors of a thousand million layers
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise BadCheckpoint(
            f"the tensors' names speak of {layers} layers, but there are {tensors} tensors; some are missing"
        )


def _fitted(family: Family, config: Any, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The family's tensors in its order and shapes; BadCheckpoint names what is missing, unknown or mis-shaped."""
    expected = family.tensor_shapes(config)
    complaints = [
        f"{len(names)} {what}: {', '.join(map(short, names[:4]))}{' …' if len(names) > 4 else ''}"
        for what, names in (
            ("missing", [name for name in expected if name not in tensors]),
            ("unknown", [name for name in tensors if name not in expected and not family.is_idle(config, name)]),
        )
        if names
    ]
    if complaints:
        raise BadCheckpoint(f"no whole {family.name} checkpoint. Tensors {'; '.join(complaints)}")
    return {name: _shaped(tensors[name], shape, name) for name, shape in expected.items()}


def _shaped(tensor: Stored, shape: tuple[int, ...], name: str) -> Stored:
    if tensor.dtype.kind in "biu":
        raise BadCheckpoint(f"{short(name)} holds {tensor.dtype} numbers, weights are floats; is the file quantised?")
    if tensor.shape == shape:
        return tensor
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        raise BadCheckpoint(f"{short(name)} has shape {list(tensor.shape)}; the other tensors ask for {list(shape)}")
    return replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape), packed=None)


def _placed(message: str, where: str) -> str:
    return message if repr(where) in message else f"{where!r}: {message}"
