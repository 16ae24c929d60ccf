"""Fine-tuning runs: give `base` and `data.path`."""

from dataclasses import replace

from rookery.adapt.config import AdaptConfig
from rookery.train.config import DataConfig, FinetuneConfig, OptimConfig


def _run(adapt: AdaptConfig, lr: float, final_lr: float, **more) -> FinetuneConfig:
    usual = {"out": f"out/{adapt.method}", "steps": 500, "batch_size": 4, "save_every": 100, "validate_every": 100}
    return FinetuneConfig(
        adapt=adapt,
        data=DataConfig(tokenizer="", sequence_length=1024),
        optim=OptimConfig(lr=lr, final_lr=final_lr, weight_decay=0.0, eps=1e-8),
        **(usual | more),
    )


def lora() -> FinetuneConfig:
    """Low-rank matrices beside the model's own, on conversations or texts."""
    return _run(AdaptConfig(method="lora", rank=32), 1e-4, 1e-5)


def pissa() -> FinetuneConfig:
    """As lora, begun from the largest part of the weights: learns faster in the first steps."""
    return _run(AdaptConfig(method="pissa", rank=32), 5e-5, 5e-6)


def miss() -> FinetuneConfig:
    """One small block per matrix, repeated over its columns: half of LoRA's numbers and memory."""
    return _run(AdaptConfig(method="miss", rank=64), 5e-5, 5e-6)


def full() -> FinetuneConfig:
    """All weights."""
    return _run(AdaptConfig(method="full"), 2e-5, 2e-6)


def state_tuning() -> FinetuneConfig:
    """Only the state that every text begins from: a style or a task in a file of a few megabytes."""
    # 1.0 for released models; entries must become as large as 1 to 10 (state_methods.md 1.2)
    return _run(AdaptConfig(method="state"), 1.0, 0.01, out="out/state")


def dpo() -> FinetuneConfig:
    """Prefer one of two answers, by LoRA; records have "chosen" and "rejected"."""
    return _run(AdaptConfig(method="lora", rank=32), 2e-5, 2e-6, learn="dpo", out="out/dpo")


def orpo() -> FinetuneConfig:
    """Learn answers and prefer them to others in one, by LoRA, without a reference."""
    return _run(AdaptConfig(method="lora", rank=32), 5e-5, 5e-6, learn="orpo", out="out/orpo")


def shakespeare_lora() -> FinetuneConfig:
    """The embedded model learns Shakespeare's plays by LoRA; give data.path=tinyshakespeare.txt."""
    return _shakespeare(AdaptConfig(method="lora", rank=16), OptimConfig(lr=3e-3, final_lr=3e-4), steps=160)


def shakespeare_state() -> FinetuneConfig:
    """The embedded model's start state learns Shakespeare's plays; give data.path=tinyshakespeare.txt."""
    return _shakespeare(AdaptConfig(method="state"), OptimConfig(lr=1.0, final_lr=0.01), steps=160)


def _shakespeare(adapt: AdaptConfig, optim: OptimConfig, steps: int) -> FinetuneConfig:
    return FinetuneConfig(
        base="embedded",
        adapt=adapt,
        data=DataConfig(tokenizer="", sequence_length=256, validation_share=0.02),
        optim=replace(optim, weight_decay=0.0, eps=1e-8),
        dtype="bfloat16",
        out=f"out/shakespeare-{adapt.method}",
        steps=steps,
        batch_size=8,
        save_every=50,
        validate_every=25,
    )
