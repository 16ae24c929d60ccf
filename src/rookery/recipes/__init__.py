"""Named training runs: functions that return a TrainConfig. `RECIPES` is what `rookery train NAME` knows."""

from collections.abc import Callable

from rookery.errors import unknown
from rookery.recipes import diffusion, distill, finetune, images, pretrain, rwkv_x
from rookery.recipes.embedded import embedded
from rookery.recipes.forecast import forecast
from rookery.recipes.tiny_test import tiny_test
from rookery.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "embedded": embedded,
    "forecast": forecast,
    "tiny-test": tiny_test,
    "digits": images.digits,
    "mnist": images.mnist,
    "cifar10": images.cifar10,
    "imagenet": images.imagenet,
    "images-finetune": images.imagenet_finetune,
    "dir-7-digits": diffusion.dir7_digits,
    "dir-7-mnist": diffusion.dir7_mnist,
    "diffusion-rwkv": diffusion.diffusion_rwkv,
    "mae": images.mae,
    "clip-nano": images.clip_nano,
    "rwkv-clip-yfcc": images.clip_yfcc,
    "minipile": pretrain.minipile,
    "pile-0.1b": pretrain.pile_small,
    "pile-0.4b": pretrain.pile_medium,
    "pile-1.4b": pretrain.pile_large,
    "rwkv-x-align": rwkv_x.align,
    "rwkv-x-long": rwkv_x.long,
    "lora": finetune.lora,
    "pissa": finetune.pissa,
    "miss": finetune.miss,
    "full": finetune.full,
    "state": finetune.state_tuning,
    "dpo": finetune.dpo,
    "orpo": finetune.orpo,
    "radlads-align": distill.radlads_align,
    "radlads-distill": distill.radlads_distill,
    "radlads-text": distill.radlads_text,
    "radlads-distill-2a": distill.radlads_distill_2a,
    "radlads-text-3a": distill.radlads_text_3a,
    "arwkv-align": distill.arwkv_align,
    "arwkv-distill": distill.arwkv_distill,
    "arwkv-sft": distill.arwkv_sft,
    "arwkv-dpo": distill.arwkv_dpo,
    "shakespeare-lora": finetune.shakespeare_lora,
    "shakespeare-state": finetune.shakespeare_state,
}
"""Name -> recipe; those that start from a model (`FinetuneConfig`) belong to `rookery finetune`, those that
start from a transformer to `rookery distill`, which runs the stages of `distill.STAGES` in a row."""


def recipe(name: str) -> TrainConfig:
    """The run of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES, "`rookery train --help`")
    return RECIPES[name]()
