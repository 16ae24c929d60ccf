"""RAD-RWKV7 (arXiv 2505.03005): Qwen2.5 with RWKV-7's recurrence and no token shift. Models QRWKV7, rwkv7qwen2."""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.converted import body_shapes, lora_rank, mixers_of
from rookery.families.layout import Layout
from rookery.families.rad import AT, RADConfig, head_sizes, projection_shapes


@dataclass(frozen=True, kw_only=True)
class RADRWKV7Config(RADConfig):
    """Sizes and choices of one RAD-RWKV7 model."""

    decay_rank: int = 64
    """Rank of the decay's low-rank map (w1, w2)."""
    rate_rank: int = 64
    """Rank of the in-context learning rate's low-rank map (a1, a2)."""
    value_rank: int = 32
    """Rank of the value residual's low-rank map (v1, v2); absent in the first block."""
    gate_rank: int = 128
    """Rank of the gate's low-rank map (g1, g2)."""
    balance_state: bool = True
    """Keys are multiplied by 1 − decay + rate; else by RWKV-7's own rule, which has k_k and k_a."""
    has_group_norm: bool = False
    """A norm over each head's output instead of a division by the root of the head size."""
    rope_theta: float | None = 1e6
    """Base of the rotary position embedding of queries and keys; None leaves positions out."""

    @property
    def shift_width(self) -> int:
        return 0


def create(*, hidden_size: int = 896, **given) -> RADRWKV7Config:
    """A config with the ranks of the training code, heads of 64 and grouped queries of one, unless given."""
    head_dim = given.setdefault("head_dim", min(64, hidden_size))
    heads = given.setdefault("num_attention_heads", max(1, hidden_size // head_dim))
    defaults = {
        "num_key_value_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "decay_rank": lora_rank(hidden_size, 0.5, 1.8),
        "rate_rank": lora_rank(hidden_size, 0.5, 1.8),
        "value_rank": lora_rank(hidden_size, 0.5, 1.3),
        "gate_rank": lora_rank(hidden_size, 0.8, 0.6),
    }
    return RADRWKV7Config(hidden_size=hidden_size, **{**defaults, **given})


def tensor_shapes(config: RADRWKV7Config) -> dict[str, tuple[int, ...]]:
    width, mixed = config.hidden_size, config.mixed_width
    ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}

    def mixer(i: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = projection_shapes(config)
        for name in "wag" if i == config.first_mixer else "wavg":
            shapes |= {f"{name}1": (width, ranks[name]), f"{name}2": (ranks[name], mixed)}
            if name != "g":
                shapes[f"{name}0"] = (1, 1, mixed)
        if not config.balance_state:
            shapes |= {"k_k": (1, 1, mixed), "k_a": (1, 1, mixed)}
        if config.has_group_norm:
            shapes |= {"ln_x.weight": (mixed,), "ln_x.bias": (mixed,)}
        return shapes

    return body_shapes(config, mixer)


def recognise(shapes: Shapes) -> bool:
    found = mixers_of(shapes, "w0")
    return bool(found) and AT.format(layer=found[0]) + "q_proj.weight" in shapes


def config_from_shapes(
    shapes: Shapes,
    head_dim: int | None = None,
    balance_state: bool | None = None,
    has_group_norm: bool | None = None,
    rope_theta: float | None = 1e6,
    attention_rope_theta: float | None = 1e6,
) -> RADRWKV7Config:
    """Sizes from the tensors. What no tensor tells has the published defaults: a balanced state, no norm, RoPE."""
    sizes = head_sizes(shapes, "RAD-RWKV7", head_dim, "w0")
    mixers = mixers_of(shapes, "w0") or [0]
    at = AT.format(layer=mixers[0])
    try:
        ranks = {name: shapes[at + part][1] for name, part in (("decay_rank", "w1"), ("rate_rank", "a1"))}
        ranks["gate_rank"] = shapes[at + "g1"][1]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RAD-RWKV7 checkpoint: {missing} is missing") from None
    if len(mixers) > 1 and (value := shapes.get(AT.format(layer=mixers[1]) + "v1")):
        ranks["value_rank"] = value[1]
    return RADRWKV7Config(
        **sizes,
        **ranks,
        balance_state=True if balance_state is None else balance_state,
        has_group_norm=bool(has_group_norm),
        rope_theta=rope_theta,
        attention_rope_theta=attention_rope_theta,
    )


def is_unused(name: str) -> bool:
    """r_k has no use without RWKV-7's bonus, nor v0, v1, v2 in the first block; published files carry them."""
    return name.endswith("self_attn.r_k") or name in {f"{AT.format(layer=0)}v{i}" for i in range(3)}


def is_idle(config: RADRWKV7Config, name: str) -> bool:
    """k_k and k_a are in the files of balanced models, too, ln_x in those without a norm."""
    parts = [*(["k_k", "k_a"] if config.balance_state else []), *([] if config.has_group_norm else ["ln_x"])]
    first = {f"{AT.format(layer=config.first_mixer)}v{i}" for i in range(3)}
    return name in first or any(f"self_attn.{part}" in name for part in parts)


FAMILY = Family(
    name="rad-rwkv7",
    kind="language",
    config=RADRWKV7Config,
    builder="rookery.models.rad_rwkv7:RADRWKV7",
    presets={
        "7b": RADRWKV7Config(
            vocab_size=152064,
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=128,
            intermediate_size=18944,
            decay_rank=96,
            rate_rank=96,
            value_rank=64,
            gate_rank=416,
        ),
        "test": RADRWKV7Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
            decay_rank=8,
            rate_rank=6,
            value_rank=4,
            gate_rank=10,
            rope_theta=1e4,
        ),
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("head_dim", "balance_state", "has_group_norm", "rope_theta", "attention_rope_theta"),
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    is_idle=is_idle,
    layouts={"hf": Layout(rules=())},
    fingerprinted=("model.embed_tokens.weight", "model.norm.weight"),
)
