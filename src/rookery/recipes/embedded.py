"""The model that ships with the package: 4.5 M parameters that write simple English."""

from rookery.train.config import DataConfig, OptimConfig, TrainConfig


def embedded() -> TrainConfig:
    """The model that ships with the package: four blocks of width 256 over 2,047 pieces, on children's stories."""
    return TrainConfig(
        model="rwkv7",
        overrides={"hidden_size": 256, "num_hidden_layers": 4},
        data=DataConfig(
            path="out/embedded/stories.jsonl",
            validation="out/embedded/held-out.jsonl",
            tokenizer="out/embedded/vocab.txt",
            sequence_length=512,
        ),
        optim=OptimConfig(lr=2e-3, final_lr=1e-5, schedule="wsd", decay_share=0.4, warmup_steps=50, weight_decay=0.1),
        out="out/embedded/run",
        steps=1300,
        batch_size=8,
        dtype="bfloat16",
        save_every=50,
        validate_every=100,
    )
