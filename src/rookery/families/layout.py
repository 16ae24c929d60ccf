"""How other formats name and shape the tensors of a family, as data; `rookery.checkpoints.layout` applies it.

A rule pairs a foreign name with an official one. `{layer}` stands for the block's number, the steps say how the
official numbers become the foreign ones; reading runs them backwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One foreign tensor and the official tensor, or stack of tensors, that it holds."""

    foreign: str
    """Foreign name: "model.layers.{layer}.attn.w_lora.lora.0.weight"."""
    official: str | tuple[str, ...]
    """Official name, or the names of tensors that are stacked along a new first axis."""
    steps: tuple[str, ...] = ()
    """Names of the steps from official to foreign, applied to each official tensor, or to the stack."""
    shorter: bool = False
    """True if the last tensors of the stack may be absent."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A format's names for one family."""

    rules: tuple[Rule, ...]
    """Tensors that no rule mentions have the same name in both."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that the format implies."""
