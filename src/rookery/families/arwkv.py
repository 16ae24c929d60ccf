"""ARWKV (arXiv 2501.15570): RWKV-7's time mix in the body of Qwen2.5. Code: yynil/RWKVInside; models rwkv_hybrid."""

from dataclasses import dataclass
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.converted import (
    GGUF_BODY,
    LAYER,
    ConvertedConfig,
    body_shapes,
    body_sizes,
    mixers_of,
)
from rookery.families.layout import Layout, Rule


@dataclass(frozen=True, kw_only=True)
class ARWKVConfig(ConvertedConfig):
    """Sizes and choices of one ARWKV model."""

    decay_rank: int = 64
    """Rank of the decay's low-rank map (w1, w2)."""
    rate_rank: int = 64
    """Rank of the in-context learning rate's low-rank map (a1, a2)."""
    value_rank: int = 32
    """Rank of the value residual's low-rank map (v1, v2); absent in the first block."""
    gate_rank: int = 128
    """Rank of the output gate's low-rank map (g1, g2)."""
    gate: Literal["none", "sigmoid", "delta"] = "none"
    """none as published; σ(x g1) g2; or 1 + σ(x g1) g2, which begins as no gate (adaptation.md A.2.1)."""
    has_group_norm: bool = False
    """A norm over each head's output."""
    group_norm_eps: float = 64e-5
    """Its epsilon."""
    attention_heads: int = 0
    """Query heads of blocks that keep attention; 0 where there are none."""
    attention_kv_heads: int = 0
    """Their key and value heads."""
    attention_head_dim: int = 0
    """Channels of one of these heads."""
    attention_bias: bool = True
    """Biases on query, key and value projections (Qwen2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attention_layers:
            for name in ("attention_heads", "attention_kv_heads", "attention_head_dim"):
                object.__setattr__(self, name, 0)
        if self.attention_layers and not min(self.attention_heads, self.attention_kv_heads, self.attention_head_dim):
            raise ValueError(
                "attention_layers needs attention_heads, attention_kv_heads and attention_head_dim, the sizes of the "
                "attention that is kept"
            )
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")

    def attention_sizes(self) -> dict[str, int | bool]:
        return {
            "num_attention_heads": self.attention_heads,
            "num_key_value_heads": self.attention_kv_heads,
            "head_dim": self.attention_head_dim,
            "qkv_bias": self.attention_bias,
        }


def create(*, hidden_size: int = 896, **given) -> ARWKVConfig:
    """A config with an MLP of four widths and the published ranks, whatever the width, unless given."""
    if hidden_size < 64:
        given.setdefault("head_dim", hidden_size)
    return ARWKVConfig(hidden_size=hidden_size, **{"intermediate_size": 4 * hidden_size, **given})


def tensor_shapes(config: ARWKVConfig) -> dict[str, tuple[int, ...]]:
    width, gated = config.hidden_size, config.gate != "none"
    vector, matrix = (1, 1, width), (width, width)
    ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}

    def mixer(i: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"x_{name}": vector for name in ("rwkvag" if gated else "rwkva")}
        for name in "wavg":
            if (name == "v" and i == config.first_mixer) or (name == "g" and not gated):
                continue
            shapes |= {f"{name}1": (width, ranks[name]), f"{name}2": (ranks[name], width)}
            if name != "g":
                shapes[f"{name}0"] = vector
        shapes |= {"k_k": vector, "k_a": vector, "r_k": (config.num_heads, config.head_dim)}
        shapes |= {f"{name}.weight": matrix for name in ("receptance", "key", "value", "output")}
        if config.has_group_norm:
            shapes |= {"ln_x.weight": (width,), "ln_x.bias": (width,)}
        return {f"time_mixer.{name}": shape for name, shape in shapes.items()}

    return body_shapes(config, mixer)


MIXER = f"{LAYER}self_attn.time_mixer."


def recognise(shapes: Shapes) -> bool:
    return bool(mixers_of(shapes, "time_mixer.r_k"))


def config_from_shapes(
    shapes: Shapes,
    gate: str | None = None,
    attention_head_dim: int | None = None,
    attention_rope_theta: float | None = 1e6,
) -> ARWKVConfig:
    """Sizes from the tensors; a gate is taken for a plain sigmoid, as other programs compute it, unless named.

    Kept attention has heads as large as those of the time mix unless the size is given.
    """
    mixers = mixers_of(shapes, "time_mixer.r_k") or [0]
    at, kept = MIXER.format(layer=mixers[0]), tuple(mixers_of(shapes, "q_proj.weight"))
    try:
        heads, head_dim = shapes[at + "r_k"]
        ranks = {"decay_rank": shapes[at + "w1"][1], "rate_rank": shapes[at + "a1"][1]}
        attention = _kept_sizes(shapes, kept[0], attention_head_dim or head_dim) if kept else {}
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole ARWKV checkpoint: {missing} is missing") from None
    sizes = body_sizes(shapes, "ARWKV")
    if heads * head_dim != sizes["hidden_size"]:
        raise BadCheckpoint(f"{at}r_k is {heads} × {head_dim}, which does not make the width {sizes['hidden_size']}")
    if at + "g1" in shapes:
        ranks |= {"gate_rank": shapes[at + "g1"][1], "gate": gate or "sigmoid"}
    if len(mixers) > 1 and (value := shapes.get(MIXER.format(layer=mixers[1]) + "v1")):
        ranks["value_rank"] = value[1]
    has_norm = at + "ln_x.weight" in shapes
    attention |= {"attention_layers": kept, "attention_rope_theta": attention_rope_theta}
    return ARWKVConfig(head_dim=head_dim, has_group_norm=has_norm, **sizes, **ranks, **attention)


def _kept_sizes(shapes: Shapes, layer: int, head_dim: int) -> dict[str, int | bool]:
    at = f"{LAYER}self_attn.".format(layer=layer)
    queries, keys = (shapes[f"{at}{name}_proj.weight"][0] for name in "qk")
    if head_dim < 1 or queries % head_dim or keys % head_dim:
        raise BadCheckpoint(
            f"the head size of the kept attention is not in the tensors, and {head_dim} does not divide its {queries} "
            f"query and {keys} key channels; keep config.json beside the file"
        )
    heads = {"attention_heads": queries // head_dim, "attention_kv_heads": keys // head_dim}
    return heads | {"attention_head_dim": head_dim, "attention_bias": at + "q_proj.bias" in shapes}


def is_unused(name: str) -> bool:
    """The first block has no earlier value to mix with; published files carry its v0, v1, v2 all the same."""
    return name in {f"{MIXER.format(layer=0)}v{i}" for i in range(3)}


def is_idle(config: ARWKVConfig, name: str) -> bool:
    """The same in a hybrid whose first blocks keep attention."""
    return name in {f"{MIXER.format(layer=config.first_mixer)}v{i}" for i in range(3)}


AT = f"{LAYER}self_attn.time_mixer."
BLK = "blk.{layer}.time_mix_"
GGUF = Layout(
    rules=(
        *GGUF_BODY,
        Rule(f"{BLK}lerp_fused.weight", tuple(f"{AT}x_{c}" for c in "rwkvag"), shorter=True),
        *(Rule(f"{BLK}{c}0.weight", f"{AT}{c}0", ("squeeze",)) for c in "wav"),
        *(Rule(f"{BLK}{c}{i}.weight", f"{AT}{c}{i}", ("transpose",)) for c in "wavg" for i in "12"),
        *(Rule(f"{BLK}{name}.weight", f"{AT}{name}", ("squeeze",)) for name in ("k_k", "k_a")),
        Rule(f"{BLK}r_k.weight", f"{AT}r_k", ("join_heads",)),
        *(Rule(f"{BLK}{name}.weight", f"{AT}{name}.weight") for name in ("receptance", "key", "value", "output")),
        *(Rule(f"{BLK}ln.{part}", f"{AT}ln_x.{part}") for part in ("weight", "bias")),
    )
)
"""llama.cpp's architecture arwkv7 (adaptation.md A.6)."""


def _size(width: int, layers: int, ffn: int, vocab_size: int = 152064, tied: bool = False) -> ARWKVConfig:
    return ARWKVConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        tie_word_embeddings=tied,
    )


FAMILY = Family(
    name="arwkv",
    kind="language",
    config=ARWKVConfig,
    builder="rookery.models.arwkv:ARWKV",
    presets={
        "0.5b": _size(896, 24, 4864, 151936, tied=True),
        "1.5b": _size(1536, 28, 8960, 151936),
        "3b": _size(2048, 36, 11008, 151936),
        "7b": _size(3584, 28, 18944),
        "14b": _size(5120, 48, 13824),
        "32b": _size(5120, 64, 27648),
        "72b": _size(8192, 80, 29696),
        "test": ARWKVConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            head_dim=16,
            intermediate_size=64,
            decay_rank=8,
            rate_rank=6,
            value_rank=4,
            gate_rank=10,
            gate="sigmoid",
        ),
        "hybrid-test": ARWKVConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            head_dim=16,
            intermediate_size=64,
            decay_rank=8,
            rate_rank=6,
            value_rank=4,
            attention_layers=(0, 3),
            attention_heads=4,
            attention_kv_heads=2,
            attention_head_dim=8,
        ),
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("gate", "attention_head_dim", "attention_rope_theta"),
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    is_idle=is_idle,
    layouts={"gguf": GGUF, "hf": Layout(rules=())},
    fingerprinted=("model.embed_tokens.weight", "model.norm.weight"),
)
