"""Pictures out of noise: digits from words, and any folder of classes."""

from rookery.data.augment import Augment
from rookery.train.config import DiffusionOptimConfig, ImageDataConfig, ImagineConfig

DIGIT_CAPTIONS = "{}|a {}|the digit {}|a handwritten {}|the number {}"


def dir7_digits() -> ImagineConfig:
    """DIR-7 that draws the 8 × 8 digits of scikit-learn from words: 0.2M parameters."""
    return ImagineConfig(
        model="dir-7-digits",
        overrides={"prediction": "flow"},
        data=ImageDataConfig(path="digits"),
        captions=DIGIT_CAPTIONS,
        optim=DiffusionOptimConfig(lr=3e-3, final_lr=1e-5, warmup_steps=50, ema=0.999),
        out="out/dir-7-digits",
        steps=1500,
        batch_size=32,
        save_every=500,
        validate_every=500,
    )


def dir7_mnist() -> ImagineConfig:
    """DIR-7 that draws the digits of MNIST (data.path, a .npz) from words: patches of 4."""
    return ImagineConfig(
        model="dir-7-digits",
        overrides={"prediction": "flow", "image_size": 28, "patch_size": 4},
        captions=DIGIT_CAPTIONS,
        optim=DiffusionOptimConfig(lr=3e-3, final_lr=1e-5, warmup_steps=50, ema=0.999),
        out="out/dir-7-mnist",
        steps=3000,
        batch_size=64,
        save_every=500,
        validate_every=500,
    )


def diffusion_rwkv() -> ImagineConfig:
    """Diffusion-RWKV on a folder of classes (data.path), small: 32 × 32 pixels, patches of 2, a learned variance."""
    return ImagineConfig(
        model="diffusion-rwkv",
        overrides={"image_size": 32, "hidden_size": 128, "num_hidden_layers": 7},
        augment=Augment(flip=True),
        optim=DiffusionOptimConfig(lr=4e-4, final_lr=1e-6, warmup_steps=500),
        out="out/diffusion-rwkv",
        steps=50_000,
        batch_size=64,
        save_every=1000,
        validate_every=5000,
    )
