"""Multiple Temporal Perspectives (arXiv 2402.02625) on RWKV-4 to 7: sizes, published tensor names, presets.

Code: RazvanDu/TemporalRNNs, for RWKV-4; no weights are published. The later versions are ours.
"""

import re
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from rookery.errors import BadCheckpoint, unknown
from rookery.families import rwkv4, rwkv5, rwkv6, rwkv7
from rookery.families.base import Family, Shapes

BASES = {module.FAMILY.name: module.FAMILY for module in (rwkv4, rwkv5, rwkv6, rwkv7)}
"""Families that perspectives can be added to."""
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers")
MIX = re.compile(r"blocks\.(\d+)\.(att|ffn)\.(time_mix|time_maa|x)_[a-z]")


def base_family(name: str) -> Family:
    """The family of that name; UnknownName where perspectives cannot be added to it."""
    if name not in BASES:
        raise unknown("base for temporal perspectives", name, list(BASES), "this list")
    return BASES[name]


def is_mix(name: str) -> bool:
    """Whether a tensor of a base is one of its token-shift mixing vectors, which every perspective has of its own."""
    return MIX.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class TemporalPerspectivesConfig:
    """A model and the number of its perspectives."""

    vocab_size: int = 50277
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    perspectives: int = 4
    """Copies of the residual stream, each with its own mixing vectors and state."""
    base: str = "rwkv4"
    """Family that they are added to."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of the base's config; those not given follow its formulas."""

    def __post_init__(self) -> None:
        if self.perspectives < 1:
            raise ValueError(f"perspectives must be at least 1, got {self.perspectives}")
        base_family(self.base)

    @property
    def base_config(self) -> Any:
        """Config of the model without perspectives."""
        return base_family(self.base).create(**{name: getattr(self, name) for name in COMMON}, **self.settings)

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of a state of the base for every perspective."""
        one = self.base_config.state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        return self.perspectives * one


def around(base: str, config: Any, perspectives: int) -> TemporalPerspectivesConfig:
    """The config that adds perspectives to a model of family `base`."""
    fields = asdict(config)
    return TemporalPerspectivesConfig(
        **{name: fields.pop(name) for name in COMMON}, perspectives=perspectives, base=base, settings=fields
    )


def create(*, base: str = "rwkv4", **given: Any) -> TemporalPerspectivesConfig:
    """A config whose unnamed sizes are the base's own."""
    plain = base_family(base).create()
    return TemporalPerspectivesConfig(base=base, **{name: getattr(plain, name) for name in COMMON} | given)


def tensor_shapes(config: TemporalPerspectivesConfig) -> dict[str, tuple[int, ...]]:
    """The base's, its mixing vectors once for each perspective, and what weighs these."""
    shapes = base_family(config.base).tensor_shapes(config.base_config)
    shapes = {name: (config.perspectives, *shape) if is_mix(name) else shape for name, shape in shapes.items()}
    return shapes | {"convert3.weight": (config.perspectives, config.hidden_size)}


def added_parameters(config: TemporalPerspectivesConfig) -> int:
    """Parameters that the perspectives add to the base: (n − 1) · C · L for each kind of mixing vector, and n · C."""
    base = base_family(config.base).tensor_shapes(config.base_config)
    mixes = sum(prod(shape) for name, shape in base.items() if is_mix(name))
    return (config.perspectives - 1) * mixes + config.perspectives * config.hidden_size


def recognise(shapes: Shapes) -> bool:
    return "convert3.weight" in shapes


def config_from_shapes(shapes: Shapes) -> TemporalPerspectivesConfig:
    """Base and sizes from the tensors alone."""
    plain = {n: s[1:] if is_mix(n) else s for n, s in shapes.items() if n != "convert3.weight"}
    for name, base in BASES.items():
        if base.recognise(plain):
            return around(name, base.config_from_shapes(plain), shapes["convert3.weight"][0])
    raise BadCheckpoint(f"convert3.weight is there, but no model that perspectives are added to ({', '.join(BASES)})")


def is_unused(name: str) -> bool:
    return any(base.is_unused(name) for base in BASES.values())


PRESETS = {size: around("rwkv4", rwkv4.PRESETS[size], 4) for size in ("169m", "430m", "1.5b", "3b")}
PRESETS["test"] = around("rwkv4", rwkv4.PRESETS["test"], 3)
PRESETS |= {f"{name}-test": around(name, BASES[name].presets["test"], 2) for name in ("rwkv5", "rwkv6", "rwkv7")}

FAMILY = Family(
    name="temporal-perspectives",
    kind="language",
    config=TemporalPerspectivesConfig,
    builder="rookery.models.temporal_perspectives:TemporalPerspectives",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
)
