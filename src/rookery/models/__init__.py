"""Torch models by name or from a file."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from rookery.nn.initial import WithoutInit
from rookery.registry import Family, configure


def build(family: Family, config: Any) -> torch.nn.Module:
    """The family's module for `config`, its weights not yet set."""
    module, _, name = family.builder.partition(":")
    model = getattr(importlib.import_module(module), name)
    with WithoutInit():
        return model(config)


def create_model(
    name: str, *, seed: int = 0, device: str | None = None, dtype: torch.dtype | None = None, **overrides: Any
):
    """A model with its published initial weights.

    `name` is a preset ("rwkv7-0.1b") or a family ("rwkv7"); `overrides` replace fields of its config. The weights are
    the same for the same `seed`, whatever the device, and rounded for a narrower `dtype`. On `device="meta"` nothing is
    allocated. Raises UnknownName for a name or field that does not exist.
    """
    family, config = configure(name, **overrides)
    with torch.device(device or "cpu"):
        model = build(family, config)
    model = model.to(dtype=dtype)
    if device != "meta":
        model.init_weights(seed)
    return model
