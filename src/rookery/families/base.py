"""The record that every family fills in."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rookery.errors import BadCheckpoint
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
    not_in_shapes: tuple[str, ...] = ()
    """Config fields that shapes leave open and that `config_from_shapes` takes as keywords where a file tells them."""
    tensor_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    """Config -> name and shape of every parameter, in the official order."""
    is_unused: Callable[[str], bool] = field(default=lambda name: False)
    """True for tensors that published files carry and the model does not use; loading drops them and says so."""
    is_idle: Callable[[Any, str], bool] = field(default=lambda config, name: False)
    """The same where the config decides: config, name -> True."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Format name ("ggmf", "fla", "gguf") -> key map; see `rookery.checkpoints.layout`."""
    fingerprinted: tuple[str, str] = ("emb.weight", "ln_out.weight")
    """Names of the embedding and of the last norm's weight, a sample of which names the model in state files."""


class Recurrent:
    """What the configs of RWKV-4 to RWKV-7 share: a state that does not grow."""

    num_hidden_layers: int
    hidden_size: int

    @property
    def wkv_shape(self) -> tuple[int, ...]:
        """One block's recurrent state of one row."""
        raise NotImplementedError

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the recurrent state: the same after any number of tokens; `itemsize` bytes a shift number."""
        wkv = math.prod(self.wkv_shape) * max(4, itemsize)  # float32, or float64 in a float64 model
        return self.num_hidden_layers * batch * (2 * self.hidden_size * itemsize + wkv)


class Headed(Recurrent):
    """What the configs since RWKV-5 share: a matrix per head."""

    head_dim: int

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def wkv_shape(self) -> tuple[int, int, int]:
        """One block's recurrent state of one row: head, value, key."""
        return self.num_heads, self.head_dim, self.head_dim


def sizes_from(shapes: Shapes, family: str) -> tuple[int, int, int]:
    """Vocabulary, width and number of blocks of an RWKV checkpoint; BadCheckpoint without embedding or blocks."""
    if "emb.weight" not in shapes:
        raise BadCheckpoint(f"not a whole {family} checkpoint: 'emb.weight' is missing")
    vocab_size, hidden_size = shapes["emb.weight"]
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    if layers == 0:
        raise BadCheckpoint(f"not a whole {family} checkpoint: it has no tensor whose name starts with 'blocks.'")
    return vocab_size, hidden_size, layers


def skeleton_shapes(
    config: Any, block: Callable[[int], dict[str, tuple[int, ...]]], norms: tuple[str, str] = ("ln1", "ln2")
) -> dict[str, tuple[int, ...]]:
    """Tensors of an RWKV model in the official order; `block(i)` gives those of the two mixers, as "att.key.weight"."""
    width, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab, width)}
    for i in range(config.num_hidden_layers):
        own = ("ln0", *norms) if i == 0 else norms
        shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for norm in own for part in ("weight", "bias")}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block(i).items()}
    return shapes | {"ln_out.weight": (width,), "ln_out.bias": (width,), "head.weight": (vocab, width)}
