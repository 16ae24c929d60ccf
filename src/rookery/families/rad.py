"""What the two RADLADS students share (arXiv 2505.03005): the teacher's own projections around a recurrence."""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families.base import Shapes
from rookery.families.converted import LAYER, ConvertedConfig, body_sizes, kept_layers, mixers_of

AT = f"{LAYER}self_attn."


@dataclass(frozen=True, kw_only=True)
class RADConfig(ConvertedConfig):
    """Sizes of the attention that was converted."""

    num_attention_heads: int = 14
    """Heads of the recurrence, the teacher's query heads."""
    num_key_value_heads: int = 2
    """Heads of keys and values, each of which serves several query heads."""
    qkv_bias: bool = True
    """Biases on query, key and value projections (Qwen2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @property
    def num_heads(self) -> int:
        return self.num_attention_heads

    @property
    def mixed_width(self) -> int:
        """Channels of all heads."""
        return self.num_attention_heads * self.head_dim

    def attention_sizes(self) -> dict[str, int | bool]:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim", "qkv_bias")
        return {name: getattr(self, name) for name in names}


def projection_shapes(config: RADConfig) -> dict[str, tuple[int, ...]]:
    """q_proj, k_proj, v_proj and o_proj."""
    mixed, width = config.mixed_width, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q", mixed), ("k", None), ("v", None)):
        rows = rows or config.num_key_value_heads * config.head_dim
        shapes[f"{name}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            shapes[f"{name}_proj.bias"] = (rows,)
    return shapes | {"o_proj.weight": (width, mixed)}


def head_sizes(shapes: Shapes, family: str, head_dim: int | None, mark: str) -> dict[str, Any]:
    """Body and heads from the tensors. The head size, if not given, is 64, or 128 where the width is at least 2048.

    Blocks without the tensor `mark` keep attention.
    """
    sizes = body_sizes(shapes, family)
    mixers = mixers_of(shapes, mark) or [0]
    at = AT.format(layer=mixers[0])
    try:
        mixed, keys = shapes[at + "q_proj.weight"][0], shapes[at + "k_proj.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole {family} checkpoint: {missing} is missing") from None
    head_dim = head_dim or (128 if sizes["hidden_size"] >= 2048 else 64)
    if head_dim < 1 or mixed % head_dim or keys % head_dim:
        raise BadCheckpoint(
            f"the head size is not in the tensors, and {head_dim} does not divide the {mixed} query and {keys} key "
            "channels; keep config.json beside the file"
        )
    heads = {"num_attention_heads": mixed // head_dim, "num_key_value_heads": keys // head_dim, "head_dim": head_dim}
    kept = {"attention_layers": kept_layers(shapes, mixers)}
    return sizes | heads | kept | {"qkv_bias": at + "q_proj.bias" in shapes}
