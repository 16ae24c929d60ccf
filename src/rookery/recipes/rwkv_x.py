"""RWKV-X's two stages (arXiv 2504.21463, 3.3.1 and appendix A): give `initial` and `data.path`."""

from rookery.train.config import DataConfig, LongCEConfig, OptimConfig, TrainConfig

# both stages keep one rate, without warm-up or weight decay
OPTIM = OptimConfig(lr=1e-5, final_lr=1e-5, warmup_steps=0, weight_decay=0.0)
ALIGN_TOKENS, LONG_TOKENS = 1_500_000_000, 1_000_000_000


def _run(length: int, rows: int, tokens: int, **more) -> TrainConfig:
    return TrainConfig(
        model="rwkv-x",
        data=DataConfig(tokenizer="world", sequence_length=length, validation_share=0.0),
        optim=OPTIM,
        steps=tokens // (length * rows),
        batch_size=rows,
        dtype="bfloat16",
        recompute=True,
        save_every=100,
        validate_every=0,
        **more,
    )


def align() -> TrainConfig:
    """RWKV-X, stage 1: sparse blocks in a trained RWKV-7 (`initial`) learn on short texts, nothing else does."""
    return _run(1024, 4000, ALIGN_TOKENS, train_only="moba.*", accumulate=250, out="out/rwkv-x-align")


def long() -> TrainConfig:
    """RWKV-X, stage 2: all weights of the model of stage 1 (`initial`) learn on texts of 64,000 tokens, by LongCE."""
    return _run(64_000, 16, LONG_TOKENS, longce=LongCEConfig(truncation=4000), accumulate=16, out="out/rwkv-x-long")
