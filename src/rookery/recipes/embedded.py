"""The model that ships with the package: 4.5 M parameters that write simple English, trained in two stages."""

from dataclasses import replace

from rookery.train.config import DataConfig, OptimConfig, TrainConfig


def embedded() -> TrainConfig:
    """First stage of the model that ships with the package: width 256, on many sampled and few real stories."""
    return TrainConfig(
        model="rwkv7",
        overrides={"hidden_size": 256, "num_hidden_layers": 4},
        data=DataConfig(
            path="out/embedded/stories.jsonl",
            validation="out/embedded/held-out.jsonl",
            tokenizer="out/embedded/vocab.txt",
            sequence_length=512,
        ),
        optim=OptimConfig(lr=2e-3, final_lr=1e-5, schedule="wsd", decay_share=0.35, warmup_steps=50, weight_decay=0.1),
        out="out/embedded/run",
        steps=2500,
        batch_size=8,
        dtype="bfloat16",
        save_every=50,
        validate_every=250,
    )


def embedded_second() -> TrainConfig:
    """Second stage of the model that ships with the package: real stories alone, at a falling rate."""
    first = embedded()
    return replace(
        first,
        initial="out/embedded/run/model.safetensors",
        data=replace(first.data, path="out/embedded/real.jsonl"),
        optim=replace(first.optim, lr=8e-4, decay_share=1.0, warmup_steps=20),
        out="out/embedded/second",
        steps=600,
    )
