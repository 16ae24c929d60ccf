"""ROSA language models (RWKV-8 previews of 2026, core.md 1.8): retrieval by longest match in the place of a recurrence.

Code: BlinkDL/RWKV-LM, RWKV-v8/260212_rosa1bitLM_L12.py and 260222_rosa4bitLM_L12.py.
"""

import re
from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes, sizes_from, skeleton_shapes


@dataclass(frozen=True, kw_only=True)
class RosaConfig:
    """Sizes and choices of one ROSA language model."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    intermediate_size: int = 3072
    """Hidden units of the channel mix."""
    bits: int = 1
    """Channels per symbol, 1 or 4: no file says which. Where nothing matches, 1-bit models answer −1, 4-bit ones 0."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.hidden_size % self.bits:
            raise ValueError(f"bits ({self.bits}) must be 1 to 8 and divide hidden_size ({self.hidden_size})")

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the state: two shifts a block, and queries, keys and values of every token."""
        return self.num_hidden_layers * batch * self.hidden_size * (2 + 3 * tokens_seen) * itemsize


def create(*, hidden_size: int = 768, **given) -> RosaConfig:
    """A config whose hidden units are four times its width unless given."""
    return RosaConfig(hidden_size=hidden_size, **{"intermediate_size": 4 * hidden_size, **given})


def mix_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one ROSA-QKV mixer."""
    shapes: dict[str, tuple[int, ...]] = {f"x_{name}": (1, 1, width) for name in "qkv"}
    for name in "qkvo":
        shapes |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
    return shapes | {"rosa_qkv.emb": (1, 1, width)}


def tensor_shapes(config: RosaConfig) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    block = {f"rosa.{name}": shape for name, shape in mix_shapes(width).items()}
    block |= {"ffn.x_k": (1, 1, width), "ffn.key.weight": (ffn, width), "ffn.value.weight": (width, ffn)}
    return skeleton_shapes(config, lambda i: block, norms=("ln2", "ln3"))


def recognise(shapes: Shapes) -> bool:
    return "blocks.0.rosa.rosa_qkv.emb" in shapes


def config_from_shapes(shapes: Shapes, *, bits: int = 1) -> RosaConfig:
    """Sizes from the tensors, which do not show `bits`."""
    vocab_size, hidden_size, layers = sizes_from(shapes, "ROSA")
    if "blocks.0.ffn.key.weight" not in shapes:
        raise BadCheckpoint("not a whole ROSA checkpoint: 'blocks.0.ffn.key.weight' is missing")
    return RosaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        intermediate_size=shapes["blocks.0.ffn.key.weight"][0],
        bits=bits,
    )


def is_unused(name: str) -> bool:
    """The published class gives every block the norm that follows the embedding; only the first one's is applied."""
    return re.fullmatch(r"blocks\.[1-9]\d*\.ln0\.(weight|bias)", name) is not None


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
PRESETS = {
    "1bit-l12": RosaConfig(),
    "4bit-l12": RosaConfig(bits=4),
    "test": RosaConfig(**SMALL),
    "4bit-test": RosaConfig(**SMALL, bits=4),
}

FAMILY = Family(
    name="rosa",
    kind="language",
    config=RosaConfig,
    builder="rookery.models.rosa:Rosa",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("bits",),
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
)
