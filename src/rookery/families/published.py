"""RWKV tensors in Hugging Face models, flash-linear-attention, llama.cpp and web-rwkv (core.md 2.2, 2.3).

RWKV-7's names in flash-linear-attention and all names of rwkv.cpp are in the families' own files.
"""

from rookery.families.layout import Layout, Rule

BLOCK = "blocks.{layer}."
PARTS = ("weight", "bias")


def _norms(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{new}.{part}", f"{old}.{part}") for new, old in names.items() for part in PARTS)


def _linear(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{new}.weight", f"{old}.weight") for new, old in names.items())


def _same(names: dict[str, str], *steps: str) -> tuple[Rule, ...]:
    return tuple(Rule(new, old, steps) for new, old in names.items())


# Hugging Face: RwkvForCausalLM of transformers for RWKV-4, models with code of their own for 5 and 6

HF = "rwkv.blocks.{layer}."
_HF_SKELETON = (
    Rule("rwkv.embeddings.weight", "emb.weight"),
    *_norms(
        {
            "rwkv.blocks.0.pre_ln": "blocks.0.ln0",
            f"{HF}ln1": f"{BLOCK}ln1",
            f"{HF}ln2": f"{BLOCK}ln2",
            f"{HF}attention.ln_x": f"{BLOCK}att.ln_x",
            "rwkv.ln_out": "ln_out",
        }
    ),
    *_linear(
        {f"{HF}attention.{name}": f"{BLOCK}att.{name}" for name in ("key", "value", "receptance", "gate", "output")}
        | {f"{HF}feed_forward.{name}": f"{BLOCK}ffn.{name}" for name in ("key", "value", "receptance")}
    ),
)
_LETTERS = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}
HF_4_5 = Layout(
    rules=(
        *_HF_SKELETON,
        *_same({f"{HF}attention.time_mix_{word}": f"{BLOCK}att.time_mix_{c}" for word, c in _LETTERS.items()}),
        *_same({f"{HF}feed_forward.time_mix_{word}": f"{BLOCK}ffn.time_mix_{c}" for word, c in _LETTERS.items()}),
        *_same({f"{HF}attention.time_{n}": f"{BLOCK}att.time_{n}" for n in ("decay", "first", "faaaa")}),
    )
)
_V6_NAMES = ("time_maa_w1", "time_maa_w2", "time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa")
HF_6 = Layout(
    rules=(
        *_HF_SKELETON,
        *_same({f"{HF}attention.time_maa_{c}": f"{BLOCK}att.time_maa_{c}" for c in "xwkvrg"}),
        *_same({f"{HF}feed_forward.time_maa_{c}": f"{BLOCK}ffn.time_maa_{c}" for c in "kr"}),
        *_same({f"{HF}attention.{name}": f"{BLOCK}att.{name}" for name in _V6_NAMES}),
    )
)

# flash-linear-attention, RWKV-6

FLA = "model.layers.{layer}."
FLA_6 = Layout(
    rules=(
        Rule("model.embeddings.weight", "emb.weight"),
        Rule("lm_head.weight", "head.weight"),
        *_norms(
            {
                "model.layers.0.pre_norm": "blocks.0.ln0",
                f"{FLA}attn_norm": f"{BLOCK}ln1",
                f"{FLA}ffn_norm": f"{BLOCK}ln2",
                f"{FLA}attn.g_norm": f"{BLOCK}att.ln_x",
                "model.norm": "ln_out",
            }
        ),
        *_linear(
            {f"{FLA}attn.{c}_proj.linear": f"{BLOCK}att.{word}" for word, c in _LETTERS.items()}
            | {f"{FLA}attn.o_proj": f"{BLOCK}att.output", f"{FLA}ffn.value": f"{BLOCK}ffn.value"}
            | {f"{FLA}ffn.{name}.linear": f"{BLOCK}ffn.{name}" for name in ("key", "receptance")}
        ),
        Rule(f"{FLA}attn.x_proj.0.mu", f"{BLOCK}att.time_maa_x", ("squeeze",)),
        # the five signals lie in another order: r first
        Rule(f"{FLA}attn.x_proj.0.linear.weight", f"{BLOCK}att.time_maa_w1", ("transpose", "r_first")),
        Rule(f"{FLA}attn.x_proj.2.weight", f"{BLOCK}att.time_maa_w2", ("join_five", "r_first", "transpose")),
        Rule(f"{FLA}attn.x_bias", tuple(f"{BLOCK}att.time_maa_{c}" for c in "rwkvg"), ("squeeze",)),
        Rule(f"{FLA}attn.w_proj.linear.lora.0.weight", f"{BLOCK}att.time_decay_w1", ("transpose",)),
        Rule(f"{FLA}attn.w_proj.linear.lora.2.weight", f"{BLOCK}att.time_decay_w2", ("transpose",)),
        Rule(f"{FLA}attn.w_proj.linear.lora.2.bias", f"{BLOCK}att.time_decay", ("squeeze",)),
        Rule(f"{FLA}attn.bonus", f"{BLOCK}att.time_faaaa"),
        Rule(f"{FLA}ffn.key.mu", f"{BLOCK}ffn.time_maa_k", ("squeeze",)),
        Rule(f"{FLA}ffn.receptance.mu", f"{BLOCK}ffn.time_maa_r", ("squeeze",)),
    )
)

# llama.cpp

GGUF = "blk.{layer}."
_GGUF_SKELETON = (
    Rule("token_embd.weight", "emb.weight"),
    Rule("output.weight", "head.weight"),
    *_norms(
        {
            "token_embd_norm": "blocks.0.ln0",
            f"{GGUF}attn_norm": f"{BLOCK}ln1",
            f"{GGUF}attn_norm_2": f"{BLOCK}ln2",
            f"{GGUF}time_mix_ln": f"{BLOCK}att.ln_x",
            "output_norm": "ln_out",
        }
    ),
    *_linear(
        {f"{GGUF}time_mix_{name}": f"{BLOCK}att.{name}" for name in ("receptance", "key", "value", "gate", "output")}
        | {f"{GGUF}channel_mix_{name}": f"{BLOCK}ffn.{name}" for name in ("key", "value", "receptance")}
    ),
)
GGUF_7 = Layout(
    rules=(
        *_GGUF_SKELETON,
        Rule(f"{GGUF}time_mix_lerp_fused.weight", tuple(f"{BLOCK}att.x_{c}" for c in "rwkvag")),
        *_same({f"{GGUF}time_mix_{c}0.weight": f"{BLOCK}att.{c}0" for c in "wav"}, "squeeze"),
        *_same({f"{GGUF}time_mix_{c}{i}.weight": f"{BLOCK}att.{c}{i}" for c in "wavg" for i in "12"}, "transpose"),
        *_same({f"{GGUF}time_mix_{name}.weight": f"{BLOCK}att.{name}" for name in ("k_k", "k_a")}, "squeeze"),
        Rule(f"{GGUF}time_mix_r_k.weight", f"{BLOCK}att.r_k", ("join_heads",)),
        Rule(f"{GGUF}channel_mix_lerp_k.weight", f"{BLOCK}ffn.x_k"),
    )
)
GGUF_6 = Layout(
    rules=(
        *_GGUF_SKELETON,
        Rule(f"{GGUF}time_mix_lerp_x.weight", f"{BLOCK}att.time_maa_x"),
        Rule(f"{GGUF}time_mix_lerp_fused.weight", tuple(f"{BLOCK}att.time_maa_{c}" for c in "wkvrg")),
        *_same({f"{GGUF}time_mix_{c}.weight": f"{BLOCK}att.time_maa_{c}" for c in ("w1", "w2")}, "transpose"),
        Rule(f"{GGUF}time_mix_first.weight", f"{BLOCK}att.time_faaaa"),
        Rule(f"{GGUF}time_mix_decay.weight", f"{BLOCK}att.time_decay", ("squeeze",)),
        *_same({f"{GGUF}time_mix_decay_{c}.weight": f"{BLOCK}att.time_decay_{c}" for c in ("w1", "w2")}, "transpose"),
        *_same({f"{GGUF}channel_mix_lerp_{c}.weight": f"{BLOCK}ffn.time_maa_{c}" for c in "kr"}),
        # files of the first converters; never written
        *_same({f"{GGUF}time_mix_lerp_{c}.weight": f"{BLOCK}att.time_maa_{c}" for c in "wkvrg"}),
    )
)

# web-rwkv's .st files, for reading

_WEB_STATE = Rule(f"{BLOCK}att.time_state", f"{BLOCK}att.time_state", ("transpose",))
WEB_5 = Layout(rules=(Rule(f"{BLOCK}att.time_first", f"{BLOCK}att.time_faaaa"), _WEB_STATE))
WEB_6 = Layout(
    rules=(
        _WEB_STATE,
        Rule(f"{BLOCK}att.time_first", f"{BLOCK}att.time_faaaa"),
        *_same({f"{BLOCK}att.time_mix_{c}": f"{BLOCK}att.time_maa_{c}" for c in "xwkvrg"}),
        *_same({f"{BLOCK}ffn.time_mix_{c}": f"{BLOCK}ffn.time_maa_{c}" for c in "kr"}),
        *_same({f"{BLOCK}att.time_mix_{c}": f"{BLOCK}att.time_maa_{c}" for c in ("w1", "w2")}, "transpose"),
        *_same({f"{BLOCK}att.time_decay_{c}": f"{BLOCK}att.time_decay_{c}" for c in ("w1", "w2")}, "transpose"),
    )
)
WEB_7 = Layout(
    rules=(
        *_same({f"{BLOCK}att.{c}{i}": f"{BLOCK}att.{c}{i}" for c in "wavg" for i in "12"}, "transpose"),
        _WEB_STATE,
    ),
)
