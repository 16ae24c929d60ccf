"""Timer (arXiv 2402.02368): a post-norm transformer over patches of a series; the baseline of the forecasters.

Code: thuml/Large-Time-Series-Model. Tensor names are ours; `published` maps those of its files.
"""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.forecast import ForecastConfig, layers_in, predicted_patches
from rookery.families.layout import Layout, Rule


@dataclass(frozen=True, kw_only=True)
class TimerConfig(ForecastConfig):
    """Sizes and choices of one Timer model."""

    hidden_size: int = 1024
    num_hidden_layers: int = 8
    patch_length: int = 96
    context_length: int = 672
    num_attention_heads: int = 8
    """Heads; shapes leave them open."""
    intermediate_size: int = 2048
    """Hidden units of the MLP."""
    norm_first: bool = False
    """Norms before the mixers instead of after the residual sum: not Timer, but the better baseline when small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the cache of keys and values after so many patches."""
        return self.num_hidden_layers * batch * 2 * tokens_seen * self.hidden_size * itemsize


def create(*, hidden_size: int = 1024, **given: Any) -> TimerConfig:
    """A config whose unnamed sizes are those of Timer; the MLP is twice as wide as the model."""
    return TimerConfig(hidden_size=hidden_size, **{"intermediate_size": 2 * hidden_size, **given})


def tensor_shapes(config: TimerConfig) -> dict[str, tuple[int, ...]]:
    width, ffn, patch = config.hidden_size, config.intermediate_size, config.patch_length
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (width, patch)}
    for i in range(config.num_hidden_layers):
        for name in ("query", "key", "value", "output"):
            shapes |= {f"blocks.{i}.{name}.weight": (width, width), f"blocks.{i}.{name}.bias": (width,)}
        shapes |= {f"blocks.{i}.up.weight": (ffn, width), f"blocks.{i}.up.bias": (ffn,)}
        shapes |= {f"blocks.{i}.down.weight": (width, ffn), f"blocks.{i}.down.bias": (width,)}
        shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    rows = config.output_patches * patch * config.outputs
    shapes |= {"ln_out.weight": (width,), "ln_out.bias": (width,)}
    return shapes | {"head.weight": (rows, width), "head.bias": (rows,)}


def recognise(shapes: Shapes) -> bool:
    return {"embed.weight", "blocks.0.query.weight", "blocks.0.norm1.weight", "head.bias"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> TimerConfig:
    """Sizes from the tensors; heads of 64 channels (8 heads where the width is 512 or 1024), as in published models."""
    try:
        width, patch = shapes["embed.weight"]
        return TimerConfig(
            hidden_size=width,
            num_hidden_layers=layers_in(shapes, "blocks."),
            patch_length=patch,
            context_length=7 * patch,
            num_attention_heads=8 if width % 8 == 0 else 1,
            intermediate_size=shapes["blocks.0.up.weight"][0],
            output_patches=predicted_patches(shapes["head.weight"][0], patch),
        )
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole Timer checkpoint: {missing} is missing") from None


LAYER = "backbone.decoder.attn_layers.{layer}."
PARTS = {
    **{
        f"{LAYER}attention.{theirs}_projection": f"blocks.{{layer}}.{ours}"
        for theirs, ours in {"query": "query", "key": "key", "value": "value", "out": "output"}.items()
    },
    f"{LAYER}norm1": "blocks.{layer}.norm1",
    f"{LAYER}norm2": "blocks.{layer}.norm2",
    "backbone.decoder.norm": "ln_out",
    "backbone.proj": "head",
    "backbone.patch_embedding.value_embedding": "embed",
}
PUBLISHED = Layout(
    rules=(
        *(Rule(f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in PARTS.items() for part in ("weight", "bias")),
        Rule(f"{LAYER}conv1.weight", "blocks.{layer}.up.weight", ("column",)),  # convolutions over one point
        Rule(f"{LAYER}conv2.weight", "blocks.{layer}.down.weight", ("column",)),
        Rule(f"{LAYER}conv1.bias", "blocks.{layer}.up.bias"),
        Rule(f"{LAYER}conv2.bias", "blocks.{layer}.down.bias"),
    )
)
"""State dicts of thuml/Large-Time-Series-Model."""

PRESETS = {
    "67m": TimerConfig(),
    "38m": TimerConfig(hidden_size=512, num_hidden_layers=12, patch_length=32, context_length=32),
    "8m": TimerConfig(num_hidden_layers=1),
    "test": TimerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_length=4,
        output_patches=2,
        context_length=32,
        levels=(0.1, 0.5, 0.9),
    ),
}

FAMILY = Family(
    name="timer",
    kind="series",
    config=TimerConfig,
    builder="rookery.models.forecast:Timer",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=lambda name: name.endswith("position_embedding.pe"),
    layouts={"published": PUBLISHED},
    fingerprinted=("embed.weight", "ln_out.weight"),
)
