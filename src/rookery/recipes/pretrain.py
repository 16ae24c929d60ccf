"""RWKV-LM's own pretraining runs of RWKV-7 (core.md 1.10): give `data.path`, a binidx file."""

from rookery.train.config import DataConfig, OptimConfig, TrainConfig

MINIPILE, PILE = 1_498_226_207, 332_115_325_534
"""Tokens of the data sets, one pass of which is a run."""


def _run(data: int, tokenizer: str, length: int, batch: int, lr: float, decay: float, **more) -> TrainConfig:
    final = 6e-5 if data == MINIPILE else 3e-5
    return TrainConfig(
        model="rwkv7",
        data=DataConfig(tokenizer=tokenizer, sequence_length=length, order="official", validation_share=0.0),
        optim=OptimConfig(lr=lr, final_lr=final, schedule="cosine", warmup_steps=10, weight_decay=decay),
        steps=data // (length * batch),
        batch_size=batch,
        dtype="bfloat16",
        recompute=True,
        save_every=1000,
        validate_every=0,
        **more,
    )


def minipile() -> TrainConfig:
    """RWKV-LM's demonstration: 191 M parameters on the 1.5 G tokens of MiniPile; its published curve ends at 3.30."""
    # the curve is from before the newer initial values (core.md 1.9)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "init": "v7-2024"}
    return _run(MINIPILE, "world", 512, 16, 6e-4, 0.001, overrides=sizes, out="out/minipile")


def pile_small() -> TrainConfig:
    """RWKV-7 0.1B on the Pile: 12 blocks of width 768, 332 G tokens."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 50304}
    return _run(PILE, "20b", 4096, 240, 8e-4, 0.1, overrides=sizes, out="out/pile-0.1b")


def pile_medium() -> TrainConfig:
    """RWKV-7 0.4B on the Pile: 24 blocks of width 1024."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 50304}
    return _run(PILE, "20b", 4096, 240, 4e-4, 0.1, overrides=sizes, out="out/pile-0.4b")


def pile_large() -> TrainConfig:
    """RWKV-7 1.4B on the Pile: 24 blocks of width 2048."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 50304}
    return _run(PILE, "20b", 4096, 240, 3e-4, 0.1, overrides=sizes, out="out/pile-1.4b")
