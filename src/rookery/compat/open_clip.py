"""open_clip's names on our models of images and texts, so that its examples run with one import changed.

from rookery.compat import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("rwkv-clip-nano", pretrained="m.safetensors")
tokenizer = open_clip.get_tokenizer("m.safetensors")
image = preprocess(PIL.Image.open("a.png"))[None]
image_features, text_features, scale = model(image, tokenizer(["a dog", "a cat"]))
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rookery.data.augment import Augment
from rookery.data.image_input import ImageInput, named_input
from rookery.data.images import array_of
from rookery.errors import BadTokenizer
from rookery.evaluate.retrieval import TEMPLATES, Embedder
from rookery.evaluate.retrieval import build_zero_shot_classifier as _classifier
from rookery.models import create_model
from rookery.registry import families, find
from rookery.registry import list_models as _names
from rookery.tokenizers.texts import TextInput, clip_tokenizer

Transform = Callable[[Any], Tensor]
"""A PIL image, or uint8 [h, w, channels], to float32 [channels, h, w]."""


def list_models() -> list[str]:
    """Names that `create_model_and_transforms` takes."""
    pairs = [family.name for family in families().values() if family.kind == "pair"]
    return [name for family in pairs for name in _names(f"{family}*")]


def create_model_and_transforms(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> tuple[nn.Module, Transform, Transform]:
    """The model and what pictures go through in training and in use; `pretrained` is a path; else weights are fresh.

    With `pretrained` the file decides on all sizes, and `model_name` may be its family alone.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision must be one of {', '.join(dtypes)}; got {precision!r}")
    if find(model_name)[0].kind != "pair":
        raise ValueError(f"{model_name!r} is no model of images and texts; {', '.join(list_models())} are")
    if pretrained:
        embedder = Embedder.open(os.fspath(pretrained), device=device)
        model, want = embedder.model, embedder.want
    else:
        model = create_model(model_name, device=device)
        want = named_input("clip", model.config.image_size, model.config.in_channels)
    learned = _training(want, Augment(area=0.9, stretch=4 / 3))
    used = lambda image: _tensor(want.prepare(array_of(image, want.channels)), want)  # noqa: E731
    return model.to(dtypes[precision]), learned, used


def _training(want: ImageInput, how: Augment) -> Transform:
    generator = np.random.default_rng()
    return lambda image: _tensor(how.picture(array_of(image, want.channels), want, generator), want)


def _tensor(pixels: np.ndarray, want: ImageInput) -> Tensor:
    return want.normalised(pixels[None])[0]


def get_tokenizer(model_or_file: str, context_length: int | None = None) -> Callable[[str | Sequence[str]], Tensor]:
    """Texts to int64 [texts, context_length], by the tokenizer of a model file, or by CLIP's (tokenizer.json or
    bpe_simple_vocab_16e6.txt.gz). BadTokenizer where the file has none."""
    if str(model_or_file).endswith((".json", ".txt", ".gz")):
        texts = TextInput(clip_tokenizer(model_or_file), 49408, context_length or 77)
    else:
        texts = Embedder.open(str(model_or_file)).texts
        if texts is None:
            raise BadTokenizer(f"{model_or_file} brings no tokenizer; give CLIP's file")
        if context_length:
            texts = TextInput(texts.tokenizer, texts.vocab_size, context_length)
    return lambda given: torch.from_numpy(texts(given))


def build_zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable[[Sequence[str]], Any],
    classnames: Sequence[str],
    templates: Sequence[str | Callable[[str], str]] = TEMPLATES,
) -> Tensor:
    """As `rookery.evaluate.retrieval.build_zero_shot_classifier`; templates may be functions of the name, too."""
    plain = [template if isinstance(template, str) else template("{}") for template in templates]
    return _classifier(model, lambda texts: np.asarray(tokenizer(texts)), classnames, plain)
