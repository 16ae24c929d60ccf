"""A tiny model of any family on any text file, in seconds: shows that training works on this machine."""

from rookery.train.config import DataConfig, OptimConfig, TrainConfig


def tiny_test() -> TrainConfig:
    """A tiny RWKV-7, or any other `model`, on any text file, in seconds: 64 wide, two blocks, bytes as tokens."""
    return TrainConfig(
        model="rwkv7",
        overrides={"hidden_size": 64, "num_hidden_layers": 2},
        data=DataConfig(tokenizer="bytes", sequence_length=64),
        optim=OptimConfig(lr=4e-3, final_lr=4e-4),
        out="out/tiny-test",
        steps=50,
        batch_size=8,
        save_every=25,
        validate_every=25,
    )
