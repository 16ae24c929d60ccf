"""Turning a transformer into an RWKV, in stages (adaptation.md A.2, B.2.4): give `teacher` and `data.path`.

Steps and rates are the published ones of the 7B models where the papers agree with themselves; small models need rates
nearer to 1e-3 and far fewer tokens.
"""

from dataclasses import replace

from rookery.adapt.config import AdaptConfig
from rookery.train.config import (
    ConvertConfig,
    DataConfig,
    DistillConfig,
    FinetuneConfig,
    OptimConfig,
    TrainConfig,
)

ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "warmup_steps": 50}
DECAYS_AND_SHIFTS = "*.self_attn.w[012],*.self_attn.time_decay*,*.self_attn.time_maa*"
"""Names in RAD-RWKV7, which shifts no tokens, and RAD-RWKV6."""


def _distil(stage: str, to: str, length: int, rows: int, steps: int, optim: OptimConfig, **more) -> DistillConfig:
    return DistillConfig(
        stage=stage,
        convert=ConvertConfig(to=to),
        data=DataConfig(tokenizer="", sequence_length=length),
        optim=optim,
        batch_size=rows,
        steps=steps,
        dtype="bfloat16",
        recompute=True,
        save_every=200,
        validate_every=500,
        **more,
    )


def radlads_align() -> DistillConfig:
    """RADLADS, step 1: the mixers learn to answer as attention did; 100 M tokens."""
    optim = OptimConfig(lr=1e-3, final_lr=1e-5, schedule="quarter-cosine", weight_decay=0.0, **ADAM)
    return _distil("align", "rad-rwkv7", 512, 32, 6100, optim, out="out/radlads/align")


def radlads_distill() -> DistillConfig:
    """RADLADS, step 2: the whole model learns the teacher's distribution; 500 M tokens."""
    optim = OptimConfig(lr=1e-5, final_lr=1e-5, schedule="linear", weight_decay=0.0, **ADAM)
    return _distil("distill", "rad-rwkv7", 512, 96, 10200, optim, out="out/radlads/distill")


def radlads_text() -> FinetuneConfig:
    """RADLADS, step 3: text of 16,384 tokens a row, without the teacher; 100 M tokens."""
    return FinetuneConfig(
        adapt=AdaptConfig(method="full"),
        mask="none",
        data=DataConfig(tokenizer="", sequence_length=16384),
        optim=OptimConfig(lr=1e-5, final_lr=1e-5, schedule="linear", weight_decay=0.0, **ADAM),
        batch_size=96,
        steps=64,
        dtype="bfloat16",
        recompute=True,
        l2wrap=0.0,
        save_every=16,
        validate_every=16,
        out="out/radlads/text",
    )


def radlads_distill_2a() -> DistillConfig:
    """RADLADS, step 2a, in place of 2 and 3: long rows, the mixers at ten times the rate of the rest; 600 M tokens."""
    rates = {"lr": 1e-5, "final_lr": 1e-5, "schedule": "linear", "mixer_lr": 1e-4, "mixer_final_lr": 1e-5}
    optim = OptimConfig(weight_decay=0.0, **rates, **ADAM)
    return _distil("distill", "rad-rwkv7", 4096, 32, 4600, optim, out="out/radlads-2a/distill")


def radlads_text_3a() -> FinetuneConfig:
    """RADLADS, step 3a, in place of 3: long text changes decays and token shifts alone."""
    text = radlads_text()
    optim = replace(text.optim, lr=1e-4, final_lr=1e-4)
    return replace(text, optim=optim, train_only=DECAYS_AND_SHIFTS, out="out/radlads-3a/text")


def arwkv_align() -> DistillConfig:
    """ARWKV, stage 1: RWKV-7's own time mixes learn to answer as attention did."""
    optim = OptimConfig(lr=1e-4, final_lr=1e-5, schedule="exponential", weight_decay=0.1, **ADAM)
    return _distil("align", "arwkv", 2048, 8, 2400, optim, out="out/arwkv/align")


def arwkv_distill() -> DistillConfig:
    """ARWKV, stage 2: the whole model learns the teacher's distribution; 40 M tokens."""
    optim = OptimConfig(lr=1e-4, final_lr=1e-5, schedule="exponential", weight_decay=0.1, **ADAM)
    return _distil("distill", "arwkv", 2048, 8, 2400, optim, out="out/arwkv/distill")


def arwkv_sft() -> FinetuneConfig:
    """ARWKV, stage 3: answers of conversations, all weights."""
    return _answers("sft", 1e-5)


def arwkv_dpo() -> FinetuneConfig:
    """ARWKV, stage 4: prefer one of two answers, all weights."""
    return _answers("dpo", 1e-6)


def _answers(learn: str, lr: float) -> FinetuneConfig:
    return FinetuneConfig(
        learn=learn,
        adapt=AdaptConfig(method="full"),
        data=DataConfig(tokenizer="", sequence_length=2048),
        optim=OptimConfig(lr=lr, final_lr=lr / 10, weight_decay=0.0, **ADAM),
        batch_size=8,
        steps=500,
        dtype="bfloat16",
        recompute=True,
        save_every=100,
        validate_every=100,
        out=f"out/arwkv/{learn}",
    )


STAGES: dict[str, dict[str, TrainConfig]] = {
    "radlads": {"align": radlads_align(), "distill": radlads_distill(), "text": radlads_text()},
    "radlads-2a": {"align": replace(radlads_align(), out="out/radlads-2a/align"), "distill": radlads_distill_2a()},
    "radlads-3a": {
        "align": replace(radlads_align(), out="out/radlads-3a/align"),
        "distill": radlads_distill(),
        "text": radlads_text_3a(),
    },
    "arwkv": {
        "align": arwkv_align(),
        "distill": arwkv_distill(),
        "sft": arwkv_sft(),
        "dpo": arwkv_dpo(),
    },
}
"""Name of a way to convert -> its stages in their order; each goes on from the model of the one before."""
OWN_DATA = ("sft", "dpo")
"""Stages that read other data than the rest: they are left out unless given their own."""
