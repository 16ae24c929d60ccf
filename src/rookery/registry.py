"""Names of models: family and preset, with a helpful error for a name that is not there. Imports no torch."""

import importlib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from typing import Any

from rookery.errors import BadCheckpoint, unknown
from rookery.families.base import Family, Shapes

FAMILY_MODULES = (
    "rwkv7",
    "rwkv7a",
    "rwkv7b",
    "meta_state",
    "rwkv8",
    "rwkv8_hybrid",
    "rwkv7_rosa",
    "rosa",
    "goldfinch",
    "temporal_perspectives",
    "rrwkv",
    "rwkv6",
    "rwkv5",
    "rwkv4",
    "rwkv_x",
    "arwkv",
    "rad_rwkv6",
    "rad_rwkv7",
    "based",
    "wuneng",
    "transformer",
    "vision_rwkv",
    "diffusion",
    "dir7",
    "clip",
    "rimer",
    "rimer_released",
    "timer",
    "rwkv_ts",
    "dlinear",
)
"""Files of `rookery.families` that define FAMILY; recognition tries them in this order."""


def families_in_order() -> Iterator[Family]:
    """One family after the other: who stops at the one it looks for does not import the others, which takes 0.1 s."""
    return (importlib.import_module(f"rookery.families.{module}").FAMILY for module in FAMILY_MODULES)


@cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    return {family.name: family for family in families_in_order()}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes and that match the shell pattern: families and their presets."""
    names = [name for f in families().values() for name in (f.name, *(f"{f.name}-{p}" for p in f.presets))]
    return [name for name in names if fnmatch(name, pattern)]


def find(name: str) -> tuple[Family, str | None]:
    """Family and preset (None for the bare family) of a registered name."""
    # longest family name first: "rwkv-x-test" must not be looked up in a family called "rwkv"
    for family in sorted(families().values(), key=lambda f: -len(f.name)):
        if name == family.name:
            return family, None
        preset = name.removeprefix(family.name + "-")
        if preset != name and preset in family.presets:
            return family, preset
    raise unknown("model", name, list_models(), "`rookery models`")


def configure(name: str, **overrides: Any) -> tuple[Family, Any]:
    """Family and config for a registered name. Overrides replace fields of the preset; an unknown field is refused."""
    from dataclasses import fields, replace

    family, preset = find(name)
    known = [f.name for f in fields(family.config)]
    for key in overrides:
        if key not in known:
            raise unknown("setting", key, known, f"{family.config.__name__}")
    if preset is None:
        return family, family.create(**overrides)
    return family, replace(family.presets[preset], **overrides)


def recognise(shapes: Shapes) -> Family:
    """The family whose tensors these are; BadCheckpoint if none claims them."""
    for family in families_in_order():
        if family.recognise(shapes):
            return family
    some = ", ".join(list(shapes)[:3]) or "no tensors at all"
    raise BadCheckpoint(f"no registered family has these tensors ({some} …). Known families: {', '.join(families())}.")
