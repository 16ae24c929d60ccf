"""RWKV-7b (core.md 1.7): RWKV-7a with "DeepEmbedAttention", a small softmax attention with 64 numbers per token.

Code: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7b_demo.py. Weights: rwkv7b-g1b-0.1b.
"""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7, rwkv7a
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class RWKV7bConfig(rwkv7a.RWKV7aConfig):
    """Sizes and choices of one RWKV-7b model."""

    query_dim: int = 256
    """Channels of queries and keys."""
    cache_rank: int = 32
    """Numbers that the cache keeps of a token's key, and as many of its value."""

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-7's state; per block a query, and keys and values of every token; the tokens as int64."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        attention = self.num_hidden_layers * (self.query_dim + 2 * self.cache_rank * tokens_seen) * itemsize
        return plain + batch * (attention + 8 * tokens_seen)


def create(*, embed_rank: int = 32, query_dim: int = 256, cache_rank: int = 32, **given) -> RWKV7bConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    more = {"embed_rank": embed_rank, "query_dim": query_dim, "cache_rank": cache_rank}
    return rwkv7.widened(rwkv7.create(**given), RWKV7bConfig, **more)


def attention_shapes(config: RWKV7bConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one block's attention."""
    vocab, width, dim, rank = config.vocab_size, config.hidden_size, config.query_dim, config.cache_rank
    shapes = {"qq.weight": (dim, width)}
    for name, size in (("k", dim), ("v", width)):
        shapes |= {f"{name}1": (width, rank), f"{name}2": (rank, size)}
        shapes |= {f"{name}_emb.weight": (vocab, size), f"{name}_emb_x.weight": (size, width)}
    for name, size in (("q", dim), ("k", dim), ("v", width)):
        shapes |= {f"x_{name}": (1, 1, size), f"ln{name}.weight": (size,), f"ln{name}.bias": (size,)}
    return shapes


def tensor_shapes(config: RWKV7bConfig) -> dict[str, tuple[int, ...]]:
    more = attention_shapes(config)
    blocks = range(config.num_hidden_layers)
    return rwkv7a.tensor_shapes(config) | {f"blocks.{i}.qkv.{name}": more[name] for i in blocks for name in more}


def recognise(shapes: Shapes) -> bool:
    return {"blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight", "blocks.0.qkv.qq.weight"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> RWKV7bConfig:
    """Sizes from the tensors alone."""
    plain = rwkv7a.config_from_shapes(shapes)
    try:
        more = {"query_dim": shapes["blocks.0.qkv.qq.weight"][0], "cache_rank": shapes["blocks.0.qkv.k1"][1]}
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-7b checkpoint: {missing} is missing") from None
    return rwkv7.widened(plain, RWKV7bConfig, **more)


PRESETS = {
    "0.1b": rwkv7.widened(rwkv7a.PRESETS["0.1b"], RWKV7bConfig),
    "test": rwkv7.widened(rwkv7a.PRESETS["test"], RWKV7bConfig, query_dim=12, cache_rank=5),
}

FAMILY = Family(
    name="rwkv7b",
    kind="language",
    config=RWKV7bConfig,
    builder="rookery.models.rwkv7b:RWKV7b",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=rwkv7.is_unused,
)
