"""RAD-RWKV6 (arXiv 2505.03005): Qwen2.5 with a gated linear recurrence from RWKV-6. Models QRWKV6, rwkv6qwen2."""

from dataclasses import dataclass
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.converted import GGUF_BODY, LAYER, body_shapes, lora_rank, mixers_of
from rookery.families.layout import Layout, Rule
from rookery.families.rad import AT, RADConfig, head_sizes, projection_shapes

SIGNALS = "rkvwg"
"""Letters of the interpolated inputs, in the order in which the low-rank factors hold them."""


@dataclass(frozen=True, kw_only=True)
class RADRWKV6Config(RADConfig):
    """Sizes and choices of one RAD-RWKV6 model."""

    mix_rank: int = 32
    """Rank of the data-dependent interpolations."""
    decay_rank: int = 64
    """Rank of the data-dependent decay."""
    gate_rank: int = 0
    """Rank of the gate; 0 for a full matrix."""
    gate: Literal["full", "low-rank", "none"] = "full"
    """σ(x Gᵀ), σ(x g1) g2, or no gate at all."""
    balance_state: bool = True
    """Keys are multiplied by 1 − decay, so that the state cannot grow."""


def create(*, hidden_size: int = 896, **given) -> RADRWKV6Config:
    """A config with the ranks of the training code, heads of 64 and grouped queries of one, unless given."""
    head_dim = given.setdefault("head_dim", min(64, hidden_size))
    heads = given.setdefault("num_attention_heads", max(1, hidden_size // head_dim))
    defaults = {
        "num_key_value_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "mix_rank": lora_rank(hidden_size, 0.5, 1.8),
        "decay_rank": lora_rank(hidden_size, 0.5, 1.8),
    }
    return RADRWKV6Config(hidden_size=hidden_size, **{**defaults, **given})


def tensor_shapes(config: RADRWKV6Config) -> dict[str, tuple[int, ...]]:
    width, mixed = config.hidden_size, config.mixed_width
    mixer: dict[str, tuple[int, ...]] = projection_shapes(config)
    mixer |= {f"time_maa_{name}": (1, 1, width) for name in "x" + SIGNALS}
    mixer |= {
        "time_maa_w1": (width, len(SIGNALS) * config.mix_rank),
        "time_maa_w2": (len(SIGNALS), config.mix_rank, width),
        "time_decay": (1, 1, mixed),
        "time_decay_w1": (width, config.decay_rank),
        "time_decay_w2": (config.decay_rank, mixed),
    }
    if config.gate == "full":
        mixer["gate.weight"] = (mixed, width)
    elif config.gate == "low-rank":
        mixer |= {"g1": (width, config.gate_rank), "g2": (config.gate_rank, mixed)}
    return body_shapes(config, lambda layer: mixer)


def recognise(shapes: Shapes) -> bool:
    found = mixers_of(shapes, "time_maa_w1")
    return bool(found) and AT.format(layer=found[0]) + "q_proj.weight" in shapes


def config_from_shapes(
    shapes: Shapes,
    head_dim: int | None = None,
    balance_state: bool | None = None,
    attention_rope_theta: float | None = 1e6,
) -> RADRWKV6Config:
    """Sizes from the tensors; the head size as in `rad.head_sizes`, the state balanced unless told otherwise."""
    sizes = head_sizes(shapes, "RAD-RWKV6", head_dim, "time_maa_w1")
    at = AT.format(layer=(mixers_of(shapes, "time_maa_w1") or [0])[0])
    try:
        ranks = {
            "mix_rank": shapes[at + "time_maa_w1"][1] // len(SIGNALS),
            "decay_rank": shapes[at + "time_decay_w1"][1],
        }
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RAD-RWKV6 checkpoint: {missing} is missing") from None
    if at + "g1" in shapes:
        ranks |= {"gate": "low-rank", "gate_rank": shapes[at + "g1"][1]}
    elif at + "gate.weight" not in shapes:
        ranks["gate"] = "none"
    balanced = True if balance_state is None else balance_state
    return RADRWKV6Config(**sizes, **ranks, balance_state=balanced, attention_rope_theta=attention_rope_theta)


BLK = "blk.{layer}.time_mix_"
OWN = f"{LAYER}self_attn."
GGUF = Layout(
    rules=(
        *GGUF_BODY,
        *(
            Rule(f"{BLK}{new}.{part}", f"{OWN}{old}.{part}")
            for new, old in {"receptance": "q_proj", "key": "k_proj", "value": "v_proj"}.items()
            for part in ("weight", "bias")
        ),
        Rule(f"{BLK}output.weight", f"{OWN}o_proj.weight"),
        Rule(f"{BLK}gate.weight", f"{OWN}gate.weight"),
        Rule(f"{BLK}lerp_x.weight", f"{OWN}time_maa_x"),
        Rule(f"{BLK}lerp_fused.weight", tuple(f"{OWN}time_maa_{c}" for c in "wkvrg")),
        # the five signals lie in another order: w first
        *(Rule(f"{BLK}{c}.weight", f"{OWN}time_maa_{c}", ("transpose", "w_first")) for c in ("w1", "w2")),
        Rule(f"{BLK}decay.weight", f"{OWN}time_decay", ("squeeze",)),
        *(Rule(f"{BLK}decay_{c}.weight", f"{OWN}time_decay_{c}", ("transpose",)) for c in ("w1", "w2")),
    )
)
"""llama.cpp's architecture rwkv6qwen2 (adaptation.md B.2.6)."""

FAMILY = Family(
    name="rad-rwkv6",
    kind="language",
    config=RADRWKV6Config,
    builder="rookery.models.rad_rwkv6:RADRWKV6",
    presets={
        "7b": RADRWKV6Config(
            vocab_size=152064,
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=128,
            intermediate_size=18944,
            mix_rank=96,
            decay_rank=96,
        ),
        "test": RADRWKV6Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
            mix_rank=4,
            decay_rank=6,
        ),
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("head_dim", "balance_state", "attention_rope_theta"),
    tensor_shapes=tensor_shapes,
    layouts={"gguf": GGUF, "hf": Layout(rules=())},
    fingerprinted=("model.embed_tokens.weight", "model.norm.weight"),
)
