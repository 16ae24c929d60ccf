"""timm's names on Vision-RWKV, so that its training scripts and heads run with one import changed.

from rookery.compat import timm

model = timm.create_model("vrwkv_tiny_patch16_224", num_classes=10, img_size=256)
maps = timm.create_model("vrwkv6_small_patch16_224", features_only=True, out_indices=(2, 5, 8, 11))
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from rookery.data.image_input import IMAGENET
from rookery.errors import unknown
from rookery.models import create_model as create
from rookery.models import load
from rookery.models.vision import VisionRWKV

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"vrwkv_{size}_patch16_224": (f"vision-rwkv-{size}", {"image_size": 224})
        for size in ("tiny", "small", "base", "large")
    },
    "vrwkv_large_patch16_384": ("vision-rwkv-large", {"image_size": 384}),
    **{
        f"vrwkv{v}_{size}_patch16_224": (f"vision-rwkv-v{v}-{size}", {"image_size": 224})
        for v in (6, 7)
        for size in ("tiny", "small", "base")
    },
    "vrwkv_nano_patch4_32": (
        "vision-rwkv",
        {"image_size": 32, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6},
    ),
    "vrwkv_nano_patch2_8": (
        "vision-rwkv",
        {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4},
    ),
}
"""timm-like name -> registered name and sizes."""


def list_models(filter: str = "*") -> list[str]:
    """Names that `create_model` takes and that match the shell pattern, in order."""
    return sorted(name for name in MODELS if fnmatch(name, filter))


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | os.PathLike[str] = "",
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A model by a timm-like name; `overrides` are fields of its config.

    With `checkpoint_path` the weights come from that file, whose sizes count, with positions for `img_size` and, for
    another `num_classes`, a new head. Nothing is downloaded: ValueError for `pretrained`. UnknownName for another name.
    """
    if pretrained:
        raise ValueError("weights are not downloaded by these names: give the file as checkpoint_path=")
    if model_name not in MODELS:
        raise unknown("model", model_name, MODELS, "`rookery.compat.timm.list_models()`")
    name, sizes = MODELS[model_name]
    if checkpoint_path:
        model = _from_file(checkpoint_path, model_name, img_size, num_classes, seed)
        if drop_path_rate is not None:
            set_drop_path(model, drop_path_rate)
    else:
        given = {"image_size": img_size, "num_classes": num_classes, "drop_path": drop_path_rate}
        chosen = {"in_channels": in_chans, **{key: value for key, value in given.items() if value is not None}}
        model = create(name, seed=seed, **{**sizes, **chosen, **overrides})
    model.default_cfg = default_cfg(model)
    return FeatureMaps(model, out_indices) if features_only else model


def _from_file(
    path: str | os.PathLike[str], model_name: str, img_size: int | None, num_classes: int | None, seed: int
) -> VisionRWKV:
    model = load(path)
    if not isinstance(model, VisionRWKV):
        raise ValueError(f"{os.fspath(path)!r} is a model of the family {model.family!r}, not {model_name!r}")
    if img_size is not None and img_size != model.config.image_size:
        model.set_input_size(img_size)
    if num_classes is not None and num_classes != model.config.num_classes:
        model.reset_classifier(num_classes, seed)
    return model


def set_drop_path(model: VisionRWKV, rate: float) -> None:
    """Another chance of leaving mixers out in training, rising to `rate` in the last block."""
    model.config = replace(model.config, drop_path=rate)
    for layer, block in enumerate(model.layers):
        block.drop_path = rate * layer / max(1, len(model.layers) - 1)


def default_cfg(model: VisionRWKV) -> dict[str, Any]:
    """What timm's data pipeline asks for."""
    config = model.config
    return {
        "input_size": (config.in_channels, config.image_size, config.image_size),
        "num_classes": config.num_classes,
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "patch_embed.projection",
        "classifier": "head",
    }


class FeatureMaps(nn.Module):
    """`maps = model(images)`: the residual stream [b, c, rows, columns] after some blocks."""

    def __init__(self, model: VisionRWKV, out_indices: Sequence[int] | None) -> None:
        """By default the last block of each fourth; ValueError for a block that there is not."""
        super().__init__()
        model.reset_classifier(0)
        self.model, layers = model, len(model.layers)
        chosen = [layers * (i + 1) // 4 - 1 for i in range(4)] if out_indices is None else out_indices
        self.out_indices = [index + layers if index < 0 else index for index in chosen]
        if wrong := [index for index in self.out_indices if not 0 <= index < layers]:
            raise ValueError(f"there is no block {wrong[0]}; the model has 0 to {layers - 1}")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels and pixels of a cell, for each map."""
        config = self.model.config
        return [
            {"num_chs": config.hidden_size, "reduction": config.patch_size, "module": f"layers.{index}"}
            for index in self.out_indices
        ]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, self.out_indices)


@torch.no_grad()
def no_weight_decay(model: VisionRWKV) -> set[str]:
    """Names of the parameters that get no weight decay: all that are no matrices."""
    groups = model.parameter_groups(weight_decay=1.0)
    free = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in free}
