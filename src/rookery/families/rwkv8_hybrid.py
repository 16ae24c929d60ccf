"""RWKV-8 preview rc00 "hybrid" (core.md 1.8): rc00 with a small softmax attention beside the time mix.

Code: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_hybrid_demo.py, which applies no norm to the embedding.
"""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7, rwkv8
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class RWKV8HybridConfig(rwkv7.RWKV7Config):
    """Sizes and choices of one RWKV-8 rc00 hybrid."""

    query_dim: int = 256
    """Channels of queries and keys."""
    cache_rank: int = 32
    """Numbers that the cache keeps of a token's key, and as many of its value."""

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-7's state; per block keys and values of every token; the tokens as int64."""
        token = self.num_hidden_layers * 2 * self.cache_rank * itemsize + 8
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        return plain + batch * tokens_seen * token


def create(*, query_dim: int = 256, cache_rank: int = 32, **given) -> RWKV8HybridConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    return rwkv7.widened(rwkv7.create(**given), RWKV8HybridConfig, query_dim=query_dim, cache_rank=cache_rank)


def attention_shapes(config: RWKV8HybridConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one block's attention."""
    vocab, width, dim, rank = config.vocab_size, config.hidden_size, config.query_dim, config.cache_rank
    shapes = {"qq": (dim, width), "kk": (rank, width), "kkup": (dim, rank), "ennk": (vocab, dim)}
    shapes |= {"vv": (rank, width), "vvup": (width, rank), "emm": (vocab, width)}
    norms = {f"ln{n}.{part}": (size,) for n, size in zip("qkv", (dim, dim, width), strict=True) for part in PARTS}
    return {f"{name}.weight": shape for name, shape in shapes.items()} | norms


PARTS = ("weight", "bias")


def tensor_shapes(config: RWKV8HybridConfig) -> dict[str, tuple[int, ...]]:
    more = attention_shapes(config)
    blocks = range(config.num_hidden_layers)
    shapes = rwkv8.tensor_shapes(config) | {f"blocks.{i}.qkv.{name}": more[name] for i in blocks for name in more}
    return {name: shape for name, shape in shapes.items() if not is_unused(name)}


def recognise(shapes: Shapes) -> bool:
    return {"blocks.0.att.r_k", "blocks.0.ffn.enn.weight", "blocks.0.qkv.qq.weight"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> RWKV8HybridConfig:
    """Sizes from the tensors alone."""
    plain = rwkv7.config_from_shapes(shapes)
    try:
        more = {"query_dim": shapes["blocks.0.qkv.qq.weight"][0], "cache_rank": shapes["blocks.0.qkv.kk.weight"][0]}
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-8 hybrid checkpoint: {missing} is missing") from None
    return rwkv7.widened(plain, RWKV8HybridConfig, **more)


def is_unused(name: str) -> bool:
    """RWKV-7's, and the norm after the embedding."""
    return rwkv7.is_unused(name) or name in {f"blocks.0.ln0.{part}" for part in PARTS}


PRESETS = {
    "pile-0.1b": rwkv7.widened(rwkv7.PRESETS["pile-0.1b"], RWKV8HybridConfig),
    "test": rwkv7.widened(rwkv7.PRESETS["test"], RWKV8HybridConfig, query_dim=12, cache_rank=5),
}

FAMILY = Family(
    name="rwkv8-hybrid",
    kind="language",
    config=RWKV8HybridConfig,
    builder="rookery.models.rwkv8:RWKV8Hybrid",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
)
