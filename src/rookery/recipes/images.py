"""Vision-RWKV as classifier of images."""

from rookery.data.augment import Augment
from rookery.train.config import (
    ImageConfig,
    ImageDataConfig,
    ImageOptimConfig,
    MaskedImageConfig,
    PairConfig,
    PairDataConfig,
)


def imagenet() -> ImageConfig:
    """Vision-RWKV-T on a folder with train/CLASS and val/CLASS (data.path), as its authors trained it: 300 epochs."""
    return ImageConfig(
        model="vision-rwkv-tiny",
        data=ImageDataConfig(normalise="imagenet", crop=0.875, workers=8),
        augment=Augment(area=0.08, flip=True, operations=2, magnitude=9.0, erase=0.25),
        optim=ImageOptimConfig(lr=1e-3, final_lr=1e-5, weight_decay=0.05, clip=5.0, warmup_steps=25_000),
        out="out/imagenet",
        steps=375_000,
        batch_size=1024,
        accumulate=4,
        dtype="bfloat16",
        save_every=1250,
        validate_every=12_500,
    )


def imagenet_finetune() -> ImageConfig:
    """A trained Vision-RWKV (initial) on another folder of classes (data.path), lower blocks learning slower."""
    return ImageConfig(
        model="vision-rwkv-tiny",
        data=ImageDataConfig(normalise="imagenet", crop=0.875, workers=4),
        augment=Augment(area=0.3, flip=True),
        optim=ImageOptimConfig(lr=2e-4, final_lr=2e-6, weight_decay=0.05, warmup_steps=50, layer_decay=0.85),
        out="out/images-finetune",
        steps=1000,
        batch_size=64,
        validate_every=250,
    )


def mae() -> MaskedImageConfig:
    """Vision-RWKV-L learns from the pictures of an ImageNet folder (data.path) without labels, as published."""
    return MaskedImageConfig(
        model="vision-rwkv-large",
        overrides={"image_size": 224, "head_hidden_size": 0},
        data=ImageDataConfig(normalise="imagenet", crop=0.875, workers=8),
        augment=Augment(area=0.2, flip=True),
        optim=ImageOptimConfig(lr=2.4e-3, final_lr=0.0, weight_decay=0.05, beta2=0.95, warmup_steps=3130),
        out="out/mae",
        steps=250_000,
        batch_size=4096,
        accumulate=1,
        dtype="bfloat16",
        save_every=1000,
        validate_every=10_000,
    )


def cifar10() -> ImageConfig:
    """A Vision-RWKV of 0.8M parameters on CIFAR-10 (data.path, a folder or a .tar): patches of 4, ten epochs."""
    return ImageConfig(
        model="vision-rwkv",
        overrides={"image_size": 32, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6},
        augment=Augment(move=4, flip=True),
        optim=ImageOptimConfig(lr=2e-3, final_lr=2e-5, weight_decay=0.05, warmup_steps=100),
        out="out/cifar10",
        steps=2340,
        batch_size=64,
        save_every=500,
        validate_every=500,
    )


def mnist() -> ImageConfig:
    """A Vision-RWKV of 0.2M parameters on the digits of MNIST (data.path, a .npz): patches of 4, one epoch."""
    return ImageConfig(
        model="vision-rwkv",
        overrides={"image_size": 28, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 4},
        augment=Augment(move=2),
        optim=ImageOptimConfig(lr=2e-3, final_lr=2e-5, weight_decay=0.05, warmup_steps=50),
        out="out/mnist",
        steps=938,
        batch_size=64,
        validate_every=300,
    )


def digits() -> ImageConfig:
    """A Vision-RWKV of 0.2M parameters on the 8 × 8 digits of scikit-learn: half a minute, nothing to fetch."""
    return ImageConfig(
        model="vision-rwkv",
        overrides={"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4},
        data=ImageDataConfig(path="digits", validation_share=0.25),
        augment=Augment(move=1),
        optim=ImageOptimConfig(lr=2e-3, final_lr=2e-5, weight_decay=0.05, warmup_steps=20),
        out="out/digits",
        steps=210,
        batch_size=64,
        validate_every=70,
    )


def clip_nano() -> PairConfig:
    """An RWKV-CLIP of 1.4M parameters on pictures of 32 pixels and a vocabulary of their words (data.path)."""
    return PairConfig(
        model="rwkv-clip-nano",
        data=PairDataConfig(),
        augment=Augment(move=3),
        optim=ImageOptimConfig(lr=1e-3, final_lr=1e-5, weight_decay=0.1, beta2=0.98, warmup_steps=50),
        out="out/clip",
        steps=500,
        batch_size=128,
        save_every=100,
        validate_every=100,
    )


def clip_yfcc() -> PairConfig:
    """RWKV-CLIP-B/32 as published: 32 passes over the 15M pairs of YFCC15M (data.path, data.tokenizer)."""
    optim = ImageOptimConfig(
        lr=1e-3, final_lr=4e-9, weight_decay=0.2, beta2=0.98, clip=1.0, warmup_steps=11_767, decay_vectors=True
    )
    return PairConfig(
        model="rwkv-clip-b32",
        overrides={"drop_path": 0.3},
        data=PairDataConfig(tokenizer="bpe_simple_vocab_16e6.txt.gz"),
        augment=Augment(area=0.7, stretch=1.25, flip=True),
        optim=optim,
        out="out/rwkv-clip-b32",
        steps=117_670,
        batch_size=4096,
        dtype="bfloat16",
        validate_every=0,
    )
