"""A small RWKV-7 forecaster on the columns of a CSV file."""

from rookery.train.config import DataConfig, OptimConfig, SeriesConfig


def forecast() -> SeriesConfig:
    """RWKV-7 on the columns of a CSV file (data.path): 64 wide, two blocks, patches of 24 rows, nine quantiles."""
    return SeriesConfig(
        model="rimer-tiny",
        overrides={"dropout": 0.1},
        data=DataConfig(),
        optim=OptimConfig(lr=1e-3, final_lr=1e-5, weight_decay=0.01, warmup_steps=50, eps=1e-8, beta2=0.999),
        out="out/forecast",
        steps=500,
        batch_size=64,
        save_every=100,
        validate_every=100,
    )
