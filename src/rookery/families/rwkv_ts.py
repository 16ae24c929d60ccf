"""RWKV-TS (arXiv 2401.09093): RWKV-5.1 blocks over overlapping patches, and one flat head for a fixed horizon.

Code: howard-hou/RWKV-TS. No weights are published; tensor names are ours.
"""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families import rwkv5
from rookery.families.base import Family, Headed, Shapes
from rookery.families.forecast import ForecastConfig, layers_in


@dataclass(frozen=True, kw_only=True)
class RWKVTSConfig(Headed, ForecastConfig):
    """Sizes and choices of one RWKV-TS model."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    patch_length: int = 16
    stride: int = 8
    """Points from the start of a patch to that of the next."""
    horizon: int = 96
    """Points that one call predicts."""
    head_dim: int = 64
    """Channels per head."""
    intermediate_size: int = 448
    """Hidden units of the channel mix."""
    dropout: float = 0.3

    def __post_init__(self) -> None:
        ForecastConfig.__post_init__(self)
        Headed.__post_init__(self)
        if self.context_length < self.patch_length or self.horizon < 1 or self.stride < 1:
            raise ValueError(
                f"RWKV-TS needs context_length ≥ patch_length and horizon, stride ≥ 1; got "
                f"{self.context_length}, {self.patch_length}, {self.horizon}, {self.stride}"
            )

    @property
    def reach(self) -> int:
        return self.horizon

    @property
    def tokens(self) -> int:
        """Patches of one context, which is drawn out by one stride at its end."""
        return (self.context_length + self.stride - self.patch_length) // self.stride + 1

    @property
    def blocks(self) -> rwkv5.RWKV5Config:
        """The same sizes as RWKV-5's mixers take them: 5.1, a decay per head and a gate."""
        names = ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
        return rwkv5.RWKV5Config(vocab_size=1, decay="head", **{name: getattr(self, name) for name in names})


def create(*, hidden_size: int = 128, **given: Any) -> RWKVTSConfig:
    """A config whose channel mix is 3.5 times as wide as the model."""
    sizes = {"intermediate_size": 7 * hidden_size // 2 // 32 * 32, **given}
    sizes.setdefault("head_dim", min(64, hidden_size))
    return RWKVTSConfig(hidden_size=hidden_size, **sizes)


def tensor_shapes(config: RWKVTSConfig) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (width, config.patch_length), "embed.bias": (width,)}
    official = rwkv5.tensor_shapes(config.blocks)
    shapes |= {name: official[name] for name in official if name.startswith(("blocks.", "ln_out."))}
    rows = config.horizon * config.outputs
    return shapes | {"head.weight": (rows, config.tokens * width), "head.bias": (rows,)}


def recognise(shapes: Shapes) -> bool:
    return {"embed.weight", "blocks.0.att.time_decay", "head.bias"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> RWKVTSConfig:
    """Sizes from the tensors, patches half overlapping; our own files say the rest themselves."""
    try:
        width, patch = shapes["embed.weight"]
        heads = shapes["blocks.0.att.time_decay"][0]
        rows, features = shapes["head.weight"]
        ffn = shapes["blocks.0.ffn.key.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-TS checkpoint: {missing} is missing") from None
    stride = max(1, patch // 2)
    return RWKVTSConfig(
        hidden_size=width,
        num_hidden_layers=layers_in(shapes, "blocks."),
        patch_length=patch,
        stride=stride,
        context_length=(features // width - 2) * stride + patch,
        horizon=rows,
        head_dim=width // heads,
        intermediate_size=ffn,
    )


FAMILY = Family(
    name="rwkv-ts",
    kind="series",
    config=RWKVTSConfig,
    builder="rookery.models.forecast:RWKVTS",
    presets={
        "base": RWKVTSConfig(),
        "test": RWKVTSConfig(
            hidden_size=32,
            head_dim=16,
            intermediate_size=64,
            patch_length=4,
            stride=2,
            context_length=32,
            horizon=8,
            levels=(0.1, 0.5, 0.9),
            dropout=0.0,
        ),
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=("embed.weight", "ln_out.weight"),
)
