"""GoldFinch (arXiv 2407.12077): an RWKV-6 trunk, one compressed cache, attention on top. Sizes, names, presets.

Code: recursal/GoldFinch-paper. Weights: recursal/GoldFinch-paper on the Hub.
"""

from dataclasses import dataclass
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Headed, Shapes, sizes_from, skeleton_shapes


@dataclass(frozen=True, kw_only=True)
class GoldFinchConfig(Headed):
    """Sizes and choices of one GoldFinch model."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    num_hidden_layers: int = 24
    """Blocks of both kinds."""
    num_gold_layers: int | None = None
    """Blocks with GOLD attention, the last ones; a third of all where None, rounded up."""
    head_dim: int = 64
    """Channels per head, of both kinds of blocks; files do not say it."""
    intermediate_size: int = 7168
    """Hidden units of the channel mix."""
    cache_rank: int = 128
    """Numbers that the cache keeps of a token besides its id: a sixteenth of the width."""
    mix_rank: int = 32
    """Rank of the data-dependent interpolations."""
    decay_rank: int = 64
    """Rank of the data-dependent decay."""
    value_rank: int = 64
    """Rank of what tells the trunk's second value from the first."""
    key_rank: int = 128
    """Rank of what a GOLD block adds to its keys and values."""
    has_second_value: bool = True
    """The trunk's current token enters through a value of its own; else through RWKV-6's bonus (Table 4)."""
    has_fading_keys: bool = True
    """The trunk's keys are multiplied by one minus the decay (Table 4)."""
    rope_theta: float | None = None
    """Base of rotary positions in GOLD attention; None for no positions at all, as in the released models."""
    rope_scale: float = 1.0
    """Positions are divided by this before they are rotated, to reach beyond the trained length."""
    keep: Literal["compressed", "keys", "all"] = "compressed"
    """What the cache holds of a token besides its id: cache_rank numbers; the key that they stand for, as the released
    code does; or that key and every GOLD block's key and value. Speed for memory, the results are the same."""
    block_size: int = 256
    """Cached tokens whose keys and values are rebuilt at a time: bounds the memory of a step."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every norm with parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_gold_layers is not None and not 1 <= self.num_gold_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_gold_layers ({self.num_gold_layers}) must be 1 to num_hidden_layers ({self.num_hidden_layers})"
            )

    @property
    def num_trunk_layers(self) -> int:
        """Blocks before the GOLD ones."""
        if self.num_gold_layers is None:
            return 2 * self.num_hidden_layers // 3
        return self.num_hidden_layers - self.num_gold_layers

    # the trunk is RWKV-6 with one norm over all heads, no gate and an interpolation more
    signals = ("r", "k", "v", "w", "v2")
    variant = "x060c"

    @property
    def group_norm_eps(self) -> float:
        return self.layer_norm_eps

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the trunk's matrices, every block's two shifts, and the cache: a 32-bit id and numbers per token."""
        width, trunk = self.hidden_size, self.num_trunk_layers
        gold = self.num_hidden_layers - trunk
        fixed = trunk * width * self.head_dim * max(4, itemsize) + self.num_hidden_layers * 2 * width * itemsize
        held = {"compressed": self.cache_rank, "keys": width, "all": width + gold * 2 * width}[self.keep]
        return batch * (fixed + tokens_seen * (4 + held * itemsize))


def create(*, hidden_size: int = 2048, **given: Any) -> GoldFinchConfig:
    """A config with the published ranks and a channel mix of 3.5 widths, unless given."""
    sizes = {
        "intermediate_size": 7 * hidden_size // 2 // 32 * 32,
        "cache_rank": max(1, hidden_size // 16),
        "key_rank": max(hidden_size // 16, 64),
        **given,
    }
    if hidden_size < 64:
        sizes.setdefault("head_dim", hidden_size)
    return GoldFinchConfig(hidden_size=hidden_size, **sizes)


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """A GoldFinch's state beside the cache of a transformer of its shape (every head its own keys and values)."""

    tokens: int
    goldfinch: int
    """Bytes of the whole state after `tokens`."""
    transformer: int
    """Bytes of keys and values after `tokens`."""
    marginal: float
    """How many times more the transformer keeps of one token: the published ratio."""
    total: float
    """How many times more it keeps altogether, GoldFinch's constant part counted."""


def cache_report(config: GoldFinchConfig, tokens: int, itemsize: int = 2) -> CacheReport:
    """Cache sizes after `tokens` tokens of one row, `itemsize` bytes a number."""
    sizes = [config.state_nbytes(tokens_seen=n, batch=1, itemsize=itemsize) for n in (0, 1, tokens)]
    token = 2 * config.num_hidden_layers * config.hidden_size * itemsize
    return CacheReport(
        tokens=tokens,
        goldfinch=sizes[2],
        transformer=tokens * token,
        marginal=token / (sizes[1] - sizes[0]),
        total=tokens * token / sizes[2],
    )


def trunk_shapes(config: GoldFinchConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a trunk block's time mix."""
    width, vector = config.hidden_size, (1, 1, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"time_maa_{name}": vector for name in ("x", *config.signals)}
    shapes |= {"time_maa_w1": (width, 5 * config.mix_rank), "time_maa_w2": (5, config.mix_rank, width)}
    shapes |= {"time_decay": vector, **factors("time_decay", width, config.decay_rank)}
    shapes |= factors("time_value2", width, config.value_rank) if config.has_second_value else {}
    shapes |= {} if config.has_second_value else {"time_faaaa": (config.num_heads, config.head_dim)}
    shapes |= {f"{name}.weight": (width, width) for name in ("receptance", "key", "value", "output")}
    return shapes | norm("ln_x", width)


def gold_shapes(config: GoldFinchConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a GOLD block's attention."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"time_maa_{name}": (1, 1, width) for name in ("x", "q", "v_cache", "k", "v")}
    shapes |= factors("time_maa_q", width, config.mix_rank)
    shapes |= {"time_maa_kv_w1": (width, 2 * config.mix_rank), "time_maa_kv_w2": (2, config.mix_rank, width)}
    shapes |= factors("time_key", width, config.key_rank) | factors("time_value", width, config.key_rank)
    shapes |= {f"{name}.weight": (width, width) for name in ("query", "output")}
    for name in "qkvx":
        shapes |= norm(f"ln_{name}", width)
    return shapes


def factors(name: str, width: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_w1": (width, rank), f"{name}_w2": (rank, width)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tensor_shapes(config: GoldFinchConfig) -> dict[str, tuple[int, ...]]:
    width, ffn, rank = config.hidden_size, config.intermediate_size, config.cache_rank
    mix: dict[str, tuple[int, ...]] = {f"ffn.time_maa_{name}": (1, 1, width) for name in "kr"}
    mix |= {"ffn.key.weight": (ffn, width), "ffn.receptance.weight": (width, width), "ffn.value.weight": (width, ffn)}

    def block(layer: int) -> dict[str, tuple[int, ...]]:
        att = trunk_shapes(config) if layer < config.num_trunk_layers else gold_shapes(config)
        return {f"att.{name}": shape for name, shape in att.items()} | mix

    cache = {"w_kv_cache_a.weight": (rank, width), "w_kv_cache_b.weight": (width, width + rank)}
    return skeleton_shapes(config, block) | cache


def recognise(shapes: Shapes) -> bool:
    return "w_kv_cache_a.weight" in shapes


def config_from_shapes(shapes: Shapes, **untold: Any) -> GoldFinchConfig:
    """Sizes from the tensors, which show neither the size of a head nor positions; `untold` may give those."""
    vocab_size, hidden_size, layers = sizes_from(shapes, "GoldFinch")
    is_gold = [f"blocks.{i}.att.query.weight" in shapes for i in range(layers)]
    gold = sum(is_gold)
    if not gold or is_gold != [False] * (layers - gold) + [True] * gold:
        raise BadCheckpoint("not a whole GoldFinch checkpoint: its last blocks have no att.query.weight")
    first = f"blocks.{layers - gold}.att."
    try:
        sizes = {
            "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
            "cache_rank": shapes["w_kv_cache_a.weight"][0],
            "mix_rank": shapes[first + "time_maa_q_w1"][1],
            "key_rank": shapes[first + "time_key_w1"][1],
        }
        if gold < layers:
            sizes["decay_rank"] = shapes["blocks.0.att.time_decay_w1"][1]
            sizes["has_second_value"] = "blocks.0.att.time_value2_w1" in shapes
            if sizes["has_second_value"]:
                sizes["value_rank"] = shapes["blocks.0.att.time_value2_w1"][1]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole GoldFinch checkpoint: {missing} is missing") from None
    if "blocks.0.att.time_faaaa" in shapes:
        untold = {"head_dim": shapes["blocks.0.att.time_faaaa"][-1], **untold}
    sizes["num_gold_layers"] = None if layers - gold == 2 * layers // 3 else gold
    return GoldFinchConfig(vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, **sizes, **untold)


def is_idle(config: GoldFinchConfig, name: str) -> bool:
    """Published files carry the bonus that the second value replaces."""
    return config.has_second_value and name.endswith(".att.time_faaaa")


_TEST = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size": 48,
    "cache_rank": 4,
    "mix_rank": 4,
    "decay_rank": 6,
    "value_rank": 5,
    "key_rank": 7,
    "block_size": 24,
}
PRESETS = {
    "0.2b": create(hidden_size=768, num_hidden_layers=12),
    "1.5b": create(),
    "test": GoldFinchConfig(**_TEST),
    "keys-test": GoldFinchConfig(**_TEST, keep="keys", rope_theta=10000.0),
    "all-test": GoldFinchConfig(**_TEST, keep="all", rope_theta=10000.0, rope_scale=2.0),
}

FAMILY = Family(
    name="goldfinch",
    kind="language",
    config=GoldFinchConfig,
    builder="rookery.models.goldfinch:GoldFinch",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("head_dim", "has_fading_keys", "rope_theta", "rope_scale", "keep", "block_size"),
    tensor_shapes=tensor_shapes,
    is_idle=is_idle,
)
