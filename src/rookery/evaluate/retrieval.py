"""How well pictures and texts find one another, and classifying pictures by what their classes are called."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.data.image_input import ImageInput, image_input, named_input
from rookery.data.images import Source, contact_sheet, pillow, read_image, resized, save_image
from rookery.errors import BadTokenizer
from rookery.models import load
from rookery.models.clip import RWKVCLIP
from rookery.tokenizers.huggingface import HuggingFaceTokenizer
from rookery.tokenizers.texts import TextInput, clip_tokenizer

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
"""What a class is called, where nothing better is known."""


def retrieval_metrics(
    similarity: Tensor,
    image_of_text: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall in both directions for `similarity` [images, texts], in float: "image to text R@1", "text to image R@5" …

    `image_of_text` says which image each text belongs to; where left out, text i to image i. An image is found right if
    any of its texts is among the k most similar. Ties count as lost: everything as similar as the right answer stands
    before it. ValueError where a text has no image, or numbers are not finite.
    """
    images, texts = similarity.shape
    owner = torch.arange(texts) if image_of_text is None else torch.as_tensor(image_of_text)
    if owner.shape != (texts,) or (texts and not 0 <= int(owner.min()) <= int(owner.max()) < images):
        raise ValueError(f"image_of_text must name one of {images} images for each of {texts} texts")
    if not similarity.isfinite().all():
        raise ValueError("similarities must be finite numbers")
    scores = similarity.float().cpu()
    right = owner == torch.arange(images)[:, None]  # [images, texts]
    wrong = scores.masked_fill(right, -torch.inf)
    best = scores.masked_fill(~right, -torch.inf).amax(1)
    known = right.any(1)  # images without a text are asked for nothing
    image_rank = (wrong >= best[:, None]).sum(1)[known]
    own = scores[owner, torch.arange(texts)]
    text_rank = (scores >= own).sum(0) - 1  # all images but the right one that are as similar
    found = {f"image to text R@{k}": float((image_rank < k).float().mean()) for k in ks}
    return found | {f"text to image R@{k}": float((text_rank < k).float().mean()) for k in ks}


@dataclass
class Embedder:
    """A model of images and texts with its views of both."""

    model: RWKVCLIP
    want: ImageInput
    texts: TextInput | None

    @staticmethod
    def open(path: str, tokenizer: str | None = None, device: str = "cpu") -> "Embedder":
        """From a file or folder. Files that `rookery train` wrote bring their tokenizer; for the published ones
        `tokenizer` is CLIP's, see `rookery.tokenizers.texts.clip_tokenizer`. ValueError for a model of another kind."""
        checkpoint = open_checkpoint(path)
        if checkpoint.family.kind != "pair":
            kind = checkpoint.family.kind
            raise ValueError(
                f"{path} is a model of kind {kind!r}; embedding needs one of images and texts, as rwkv-clip"
            )
        config, metadata, words = checkpoint.config, checkpoint.metadata, None
        if tokenizer:
            words = clip_tokenizer(tokenizer)
        elif "text_tokenizer" in metadata:
            words = HuggingFaceTokenizer.from_json(metadata["text_tokenizer"], "its own", eos_id=0)
        want = image_input(config, metadata)
        if "image_input" not in metadata:
            want = named_input("clip", config.image_size, config.in_channels, crop=1.0)
        texts = words and TextInput(words, config.vocab_size, config.context_length)
        return Embedder(load(checkpoint, device=device).eval(), want, texts)

    @torch.no_grad()
    def images(self, pictures: Sequence[Source], batch_size: int = 64) -> Tensor:
        """float32 [pictures, c], each of length 1."""
        found = []
        for start in range(0, len(pictures), batch_size):
            some = [self.want.prepare(read_image(p, self.want.channels)) for p in pictures[start : start + batch_size]]
            found.append(self.model.encode_image(self.want.normalised(np.stack(some)).to(self.model.logit_scale)).cpu())
        return torch.cat(found) if found else torch.zeros(0, self.model.config.hidden_size)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """float32 [texts, c], each of length 1; BadTokenizer where the model came without a tokenizer."""
        if self.texts is None:
            raise BadTokenizer(
                "this model brings no tokenizer: name CLIP's, tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
            )
        device, found = self.model.logit_scale.device, []
        for start in range(0, len(texts), batch_size):
            tokens = torch.from_numpy(self.texts(texts[start : start + batch_size]))
            found.append(self.model.encode_text(tokens.to(device)).cpu())
        return torch.cat(found) if found else torch.zeros(0, self.model.config.hidden_size)


@torch.no_grad()
def build_zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable[[Sequence[str]], np.ndarray],
    classnames: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """A column of length 1 for each class, [c, classes]: the mean of its names' features, "{}" in `templates` being the
    name. `image_features @ classifier` are the logits. ValueError without classes or templates."""
    if not classnames or not templates:
        raise ValueError("a classifier needs at least one class and one template")
    device, columns = next(model.parameters()).device, []
    for name in classnames:
        tokens = torch.from_numpy(np.asarray(tokenizer([template.replace("{}", name) for template in templates])))
        columns.append(normalize(model.encode_text(tokens.to(device)).mean(0), dim=-1))
    return torch.stack(columns, dim=1)


def search(images: Tensor, texts: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """For each text the `top` most similar images, as number and cosine, the most similar first."""
    best = (texts @ images.T).topk(min(top, len(images)))
    return [list(zip(places, scores)) for places, scores in zip(best.indices.tolist(), best.values.tolist())]


def search_sheet(
    path: str | os.PathLike[str],
    pictures: Sequence[Source],
    texts: Sequence[str],
    found: Sequence[Sequence[tuple[int, float]]],
    side: int = 72,
) -> None:
    """Writes a picture with a row for each text: the text, and the pictures found in a square of `side` pixels each."""
    from PIL import ImageDraw

    rows = []
    for text, hits in zip(texts, found):
        tiles = [squared(read_image(pictures[place]), side) for place, _ in hits]
        row = contact_sheet(tiles, len(tiles), gap=4)
        label = pillow().new("RGB", (row.shape[1], 16), "white")
        ImageDraw.Draw(label).text((4, 2), text, fill="black")
        rows.append(np.concatenate([np.asarray(label), row]))
    save_image(contact_sheet(rows, 1, gap=2), path)


def squared(pixels: np.ndarray, side: int) -> np.ndarray:
    """The whole picture on a white square."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = resized(pixels, height, width)
    return square


def write_vectors(
    path: str | os.PathLike[str], names: Sequence[str], images: Tensor, texts: Sequence[str], features: Tensor | None
) -> None:
    """Writes a .npz: `names` and `images` [n, c], `texts` and `text_features` [m, c], float32 of length 1."""
    found = images.new_zeros(0, images.shape[1]) if features is None else features
    arrays = {"names": np.array(names), "images": images.numpy(), "texts": np.array(texts, dtype=str)}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, text_features=found.numpy())
