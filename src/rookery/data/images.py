"""Pictures from folders, archives and arrays as uint8 [height, width, channels], and what happens to strange ones.

Any file becomes as many channels as asked for: transparency is laid on white, greys are repeated for colour and colours
weighed for grey (ITU-R 601), 16 bits become 8, the orientation of a photograph is applied, of an animation the first
frame is taken. One pixel is a picture. What is damaged, or larger than `MAX_PIXELS`, is refused by name.
"""

import gzip
import importlib.util
import io
import os
import struct
import tarfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.errors import MissingDependency, RookeryError

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded unless told otherwise: 64 megapixels, 256 MB while it is decoded."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Files that are taken for pictures."""
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test")
"""Names of the folders that hold the two parts of a set of pictures, the first that exists of each."""


DAMAGE = (OSError, SyntaxError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, struct.error)
"""What decoders raise: SyntaxError for broken chunks of PNG, ValueError for broken numbers of PPM, and so on."""


class BadImage(RookeryError, ValueError):
    """A picture is damaged, too large, or of a kind that cannot be read."""


@dataclass(frozen=True)
class Slice:
    """Bytes of a file, for example a member of an archive."""

    path: Path
    name: str
    """What messages call it."""
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


Source = np.ndarray | Path | str | Slice | bytes
"""One picture: its pixels, its file, where it lies in an archive, or the bytes of a file."""


def pillow():
    """Pillow's `Image` module; MissingDependency that names the extra."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency('pictures need pillow: pip install "rookery[vision]"') from None
    return Image


def read_image(source: Source, channels: int = 3, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture as uint8 [height, width, channels], `channels` 1 or 3.

    Raises FileNotFoundError, and BadImage for what is no picture, is cut off, or has more than `max_pixels` pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures are read with 1 or 3 channels, not {channels}")
    if isinstance(source, np.ndarray):
        return _channels(source, channels)
    Image, name = pillow(), "the picture" if isinstance(source, bytes) else str(source)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no picture {name!r}")
    file = source.read() if isinstance(source, Slice) else source
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with _quiet(), Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(_too_large(name, image.size, max_pixels))
            return _channels(_pixels(image), channels)
    except Image.DecompressionBombError:
        raise BadImage(_too_large(name, None, max_pixels)) from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"{name} is no picture that can be read; give one of {', '.join(SUFFIXES)}") from None
    except BadImage:
        raise
    except DAMAGE as problem:
        raise BadImage(f"{name} is damaged or cut off ({problem}); leave it out or fetch it again") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow on large sizes, which have an error of ours, and on damaged notes beside whole pixels."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python's filters belong to all threads: several that changed them at once would leave them changed
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def array_of(image: Any, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels] of an image that Pillow has opened, or of pixels."""
    return _channels(image if isinstance(image, np.ndarray) else _pixels(image), channels)


def _too_large(name: str, size: tuple[int, int] | None, limit: int) -> str:
    found = f"is {size[0]} × {size[1]} pixels, {size[0] * size[1] / 1e6:.0f} megapixels" if size else "is far too large"
    return f"{name} {found}; up to {limit / 1e6:.0f} are read: make it smaller, or give a larger max_pixels"


def _pixels(image) -> np.ndarray:
    """uint8 [h, w, 1, 3 or 4] of an opened picture."""
    from PIL import ImageOps

    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
    if image.mode == "I":  # 16 bits that Pillow holds in 32
        return (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)[..., None]
    if image.mode == "F":
        raise BadImage("pictures of floating-point pixels are not read; convert them to 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


def _channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [h, w, 1 to 4] (or [h, w]) with 1 or 3 channels; 2 and 4 channels have a transparency last."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise BadImage(
            f"pixels must be uint8 [height, width, 1 to 4 channels] of at least one pixel, got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:] / 255.0
        pixels = np.rint(pixels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]


@dataclass(frozen=True)
class Images:
    """Labelled pictures, read when they are asked for: `images[i]` is uint8 [height, width, channels]."""

    sources: Sequence[Source]
    """One per picture, or an array uint8 [n, height, width, channels]."""
    labels: np.ndarray
    """int64 [n], places in `classes`."""
    classes: tuple[str, ...]
    """Names of the classes."""
    channels: int = 3
    """1 or 3."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.sources[index], self.channels)

    def select(self, numbers: np.ndarray) -> "Images":
        """Some of the pictures, in the order given."""
        chosen = self.sources
        chosen = chosen[numbers] if isinstance(chosen, np.ndarray) else [chosen[int(i)] for i in numbers]
        return Images(chosen, self.labels[numbers], self.classes, self.channels)

    def split(self, share: float, seed: int = 0) -> tuple["Images", "Images"]:
        """The rest, and `share` of each class (at least one picture of a class that has two), drawn by `seed`."""
        generator, held = np.random.default_rng(seed), []
        for label in np.unique(self.labels):
            places = generator.permutation(np.flatnonzero(self.labels == label))
            held.append(places[: max(round(share * len(places)), min(1, len(places) - 1))])
        held_out = np.sort(np.concatenate(held))
        return self.select(np.setdiff1d(np.arange(len(self)), held_out)), self.select(held_out)


def image_folder(path: str | os.PathLike[str], channels: int = 3) -> Images:
    """Pictures below the folders of `path`, each folder a class (the layout of ImageNet). Classes in order of name.

    Raises FileNotFoundError for no folder, ValueError where it has no folders of pictures.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path)!r}")
    found = {folder.name: sorted(_pictures(folder)) for folder in sorted(path.iterdir()) if folder.is_dir()}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise ValueError(f"{path}: expected a folder of pictures ({', '.join(SUFFIXES)}) for each class, found none")
    labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    return Images([file for files in found.values() for file in files], labels, tuple(found), channels)


def _pictures(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def tar_members(path: str | os.PathLike[str]) -> list[Slice]:
    """Files of an uncompressed .tar, in their order, to be read one by one; ValueError for another kind of file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with tarfile.open(path, "r:") as archive:
            return [Slice(path, m.name.removeprefix("./"), m.offset_data, m.size) for m in archive if m.isfile()]
    except tarfile.TarError as problem:
        raise ValueError(f"{path} is no uncompressed tar archive ({problem}); decompress it first") from None


def tar_images(path: str | os.PathLike[str], part: str, channels: int = 3) -> Images:
    """Pictures of an archive with members PART/CLASS/NAME, as the CIFAR-10 archive has them."""
    parts = [(member, member.name.split("/")) for member in tar_members(path)]
    found = [(member, names[1]) for member, names in parts if len(names) == 3 and names[0] == part]
    if not found:
        raise ValueError(f"{path}: no member {part}/CLASS/NAME in the archive")
    classes = tuple(sorted({name for _, name in found}))
    labels = np.array([classes.index(name) for _, name in found])
    return Images([member for member, _ in found], labels, classes, channels)


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")
"""Names of the arrays of a set in one .npz."""


def mnist(path: str | os.PathLike[str]) -> tuple[Images, Images]:
    """Training and test pictures of a .npz with train_images, train_labels, test_images, test_labels.

    The names x_train, y_train, x_test, y_test do as well. Pixels are uint8 [n, h, w] or [n, h, w, 1 or 3]; ValueError
    where arrays are missing or of other shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with np.load(path) as arrays:
        names = ARRAYS[1] if "x_train" in arrays else ARRAYS[0]
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"{path} has no array {missing[0]!r}; expected {', '.join(names)}")
        pixels, labels, test_pixels, test_labels = (arrays[name] for name in names)
    classes = tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))
    train, test = (pixels, labels), (test_pixels, test_labels)
    return _array_images(*train, classes, path), _array_images(*test, classes, path)


def _array_images(pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], path: Path) -> Images:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if (
        pixels.ndim != 4
        or pixels.dtype != np.uint8
        or pixels.shape[-1] not in (1, 3)
        or labels.shape != pixels.shape[:1]
    ):
        raise ValueError(
            f"{path}: expected uint8 pictures [n, height, width] or [n, height, width, 1 or 3] and as many labels, got "
            f"{pixels.dtype} {list(pixels.shape)} and {list(labels.shape)}"
        )
    return Images(pixels, labels.astype(np.int64), classes, pixels.shape[-1])


def digits() -> Images:
    """The 1,797 handwritten digits of 8 × 8 pixels that scikit-learn brings along, 17 greys spread over 0 to 255."""
    found = importlib.util.find_spec("sklearn")  # its file alone: importing it takes seconds
    if found is None or found.origin is None:
        raise MissingDependency('the 8 × 8 digits come with scikit-learn: pip install "rookery[vision]"')
    with gzip.open(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Images(pixels, table[:, 64].astype(np.int64), tuple("0123456789"), 1)


def drawn_shapes(count: int, size: int = 16, seed: int = 0) -> Images:
    """Generated pictures of four classes, a disc, a square, a cross and stripes, in any place, size and grey."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    y, x = np.mgrid[:size, :size]
    pixels = np.empty((count, size, size, 1), np.uint8)
    for i, label in enumerate(labels):
        radius = generator.uniform(0.2, 0.32) * size
        cy, cx = generator.uniform(radius, size - 1 - radius, 2)
        dy, dx = abs(y - cy), abs(x - cx)
        square = np.maximum(dy, dx) <= radius
        shape = [np.hypot(dy, dx) <= radius, square, square & (np.minimum(dy, dx) < radius / 3), square & (y % 2 == 0)]
        noise = generator.normal(0, 12, (size, size))
        pixels[i, ..., 0] = (shape[label] * generator.uniform(150, 240) + noise).clip(0, 255)
    return Images(pixels, labels, ("disc", "square", "cross", "stripes"), 1)


def open_images(path: str, channels: int = 0, share: float = 0.1, seed: int = 0) -> tuple[Images, Images]:
    """Training and held-out pictures of what `path` names.

    A .npz (see `mnist`), a .tar with train/CLASS/NAME and test/CLASS/NAME, a folder with train/CLASS and val/CLASS (or
    test), a folder of classes, of which `share` is held out, or "digits", scikit-learn's, with `share` held out.
    `channels` 0 keeps those of arrays and takes 3 for files.
    """
    if path == "digits":
        found = digits().split(share, seed)
    elif path.endswith(".npz"):
        found = mnist(path)
    elif path.endswith(".tar"):
        found = tar_images(path, "train"), tar_images(path, "test")
    else:
        train, test = (next((Path(path, n) for n in names if Path(path, n).is_dir()), None) for names in (TRAIN, TEST))
        if train is None:
            found = image_folder(path).split(share, seed)
        elif test is None:
            found = image_folder(train).split(share, seed)
        else:
            found = image_folder(train), image_folder(test)
    train, test = (Images(p.sources, p.labels, p.classes, channels or p.channels) for p in found)
    return train, _same_classes(test, train.classes, path)


def _same_classes(test: Images, classes: tuple[str, ...], path: str) -> Images:
    if unseen := sorted(set(test.classes) - set(classes)):
        raise ValueError(f"{path}: the class {unseen[0]!r} is held out but has no picture to train on")
    places = np.array([classes.index(name) for name in test.classes])
    return Images(test.sources, places[test.labels], classes, test.channels)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 1 or 3] at another size: bicubic, with the average of what a smaller pixel covers."""
    if pixels.shape[:2] == (height, width):
        return pixels
    Image = pillow()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return small[..., None] if small.ndim == 2 else small


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures uint8 [h, w, channels] of one size side by side on white, row after row: uint8 [H, W, 3]."""
    if not len(pictures) or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    tiles = [_channels(picture, 3) for picture in pictures]
    if len({tile.shape for tile in tiles}) > 1:
        raise ValueError("the pictures of a contact sheet must have one size; resize them first")
    height, width = (side + gap for side in tiles[0].shape[:2])
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * height + gap, min(columns, len(tiles)) * width + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + i // columns * height, gap + i % columns * width
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return sheet


def save_image(pixels: np.ndarray, path: str | os.PathLike[str], scale: int = 1) -> None:
    """Writes uint8 [h, w, 1 or 3] in the format of the path's suffix, each pixel `scale` × `scale` large."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a picture's name ends in one of {', '.join(SUFFIXES)}")
    large = _channels(pixels, 3).repeat(scale, axis=0).repeat(scale, axis=1)
    with replacing(path) as temporary, Path(temporary).open("wb") as file:
        pillow().fromarray(large).save(file, format=pillow().registered_extensions()[path.suffix.lower()])
