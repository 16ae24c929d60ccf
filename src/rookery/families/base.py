"""The record that every family fills in."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rookery.families.layout import Layout

Kind = Literal["language", "image", "pair", "diffusion", "series"]
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, as a checkpoint reports them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything about a family that needs no torch.

    `models/<name>.py` holds the torch module that `builder` names ("module:Class"); it is imported to build a model.
    """

    name: str
    """Registered name, the part before the dash of every preset."""
    kind: Kind
    """What the model takes and returns; chooses the contract that tests hold it to."""
    config: type
    """The frozen dataclass that describes one model of the family."""
    builder: str
    """Import path of the torch module, "package.module:Class"."""
    presets: Mapping[str, Any]
    """Name after the dash ("0.1b", "test") -> config."""
    create: Callable[..., Any]
    """Overrides -> config for the bare family name; sizes not given follow the newest official formula."""
    recognise: Callable[[Shapes], bool]
    """True if tensors of these (official) names and shapes are this family's."""
    config_from_shapes: Callable[[Shapes], Any]
    """Config read off tensor shapes, never from a formula; raises BadCheckpoint naming what is missing."""
    tensor_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    """Config -> name and shape of every parameter, in the official order."""
    is_unused: Callable[[str], bool] = field(default=lambda name: False)
    """True for tensors that published files carry and the model does not use; loading drops them and says so."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Format name ("ggmf", "fla", "gguf") -> key map; see `rookery.checkpoints.layout`."""
    fingerprinted: tuple[str, str] = ("emb.weight", "ln_out.weight")
    """Names of the embedding and of the last norm's weight, a sample of which names the model in state files."""


def recurrent_nbytes(config: Any, *, batch: int, itemsize: int) -> int:
    """Bytes of an RWKV state: two shift vectors and one recurrent state a block, the latter in float32 at least."""
    wkv = math.prod(config.wkv_shape) * max(4, itemsize)
    return config.num_hidden_layers * batch * (2 * config.hidden_size * itemsize + wkv)
