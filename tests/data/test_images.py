import importlib.util
import io
import zlib
from contextlib import suppress

import numpy as np
import pytest
from support.data import shared

from rookery.data.emoji import VENDORS, noto_emoji, vendor_emoji
from rookery.data.images import (
    BadImage,
    contact_sheet,
    digits,
    drawn_shapes,
    image_folder,
    mnist,
    open_images,
    read_image,
    save_image,
    tar_images,
    tar_members,
)
from rookery.errors import MissingDependency

Image = pytest.importorskip("PIL.Image")

COLOURS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def png(pixels, mode=None, **how):
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG", **how) if mode else Image.fromarray(pixels).save(file, "PNG", **how)
    return file.getvalue()


def test_pixels_come_back_as_they_were_written(tmp_path):
    save_image(COLOURS, tmp_path / "a.png", scale=2)
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read[::2, ::2], COLOURS)
    with pytest.raises(ValueError, match="ends in one of"):
        save_image(COLOURS, tmp_path / "a.txt")


def test_one_pixel_is_a_picture():
    assert read_image(png(COLOURS[:1, :1])).shape == (1, 1, 3)


def test_greys_are_repeated_and_colours_weighed():
    grey = np.array([[0, 200]], np.uint8)
    np.testing.assert_array_equal(read_image(png(grey)), np.repeat(grey[..., None], 3, 2))
    weighed = read_image(png(COLOURS), channels=1)
    np.testing.assert_allclose(weighed[..., 0], COLOURS @ [0.299, 0.587, 0.114], atol=0.5)


def test_transparency_lies_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(read_image(png(rgba)), expected)
    np.testing.assert_array_equal(read_image(rgba), expected)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    np.testing.assert_array_equal(read_image(file.getvalue()), [[[255, 255, 255], [40, 50, 60]]])


def test_sixteen_bits_become_eight():
    np.testing.assert_array_equal(read_image(png(np.array([[0, 256, 65535]], np.uint16)), 1)[..., 0], [[0, 1, 255]])


def test_the_orientation_of_a_photograph_is_applied():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(COLOURS).save(file, "PNG", exif=exif)
    assert read_image(file.getvalue()).shape == (3, 2, 3)


def test_a_picture_that_is_cut_off_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        save_image(noise, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadImage, match=rf"{name} is damaged or cut off"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"])
def test_whatever_is_damaged_is_read_or_refused_and_nothing_else(form):
    generator, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(generator.integers(0, 255, (12, 15, 3), dtype=np.uint8)).save(file, form)
    for attempt in range(60):
        damaged = bytearray(file.getvalue())
        if attempt % 2:
            damaged = damaged[: generator.integers(1, len(damaged))]
        for _ in range(3):
            damaged[generator.integers(min(len(damaged), 200))] = generator.integers(256)
        with suppress(BadImage):
            assert read_image(bytes(damaged)).dtype == np.uint8


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"a\.png is no picture"):
        read_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        read_image(tmp_path / "b.png")
    with pytest.raises(BadImage, match=r"got float64 \[2, 2, 3\]"):
        read_image(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="with 1 or 3 channels, not 2"):
        read_image(COLOURS, 2)
    with pytest.raises(BadImage, match="floating-point"):
        tiff = io.BytesIO()
        Image.fromarray(np.zeros((2, 2), np.float32)).save(tiff, "TIFF")
        read_image(tiff.getvalue())


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_huge_picture_is_refused_before_it_is_decoded(side):
    header = png(np.zeros((1, 1), np.uint8))
    size = side.to_bytes(4, "big") * 2
    ihdr = b"IHDR" + size + header[24:29]
    bomb = header[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + header[33:]
    with pytest.raises(BadImage, match=r"megapixels; up to 64 are read|far too large; up to 64 are read"):
        read_image(bomb)
    with pytest.raises(BadImage, match="up to 0 are read"):
        read_image(png(COLOURS), max_pixels=5)


def folder(root, classes, per_class=4):
    for value, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            save_image(np.full((3 + i, 4, 3), 50 * value, np.uint8), root / name / f"{i}.png")


def test_folders_are_classes(tmp_path):
    folder(tmp_path, ("b", "a"))
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    images = image_folder(tmp_path)
    assert images.classes == ("a", "b")
    assert len(images) == 8
    assert [int(images[i].mean()) for i in (0, 7)] == [50, 0]
    assert images[3].shape == (6, 4, 3)
    train, held_out = open_images(str(tmp_path))
    assert (len(train), len(held_out)) == (6, 2)
    assert sorted(held_out.labels) == [0, 1]


def test_folders_of_training_and_validation_keep_their_classes(tmp_path):
    folder(tmp_path / "train", ("a", "b", "c"), 2)
    folder(tmp_path / "val", ("b",), 1)
    train, held_out = open_images(str(tmp_path), channels=1)
    assert held_out.classes == train.classes == ("a", "b", "c")
    assert held_out.labels.tolist() == [1]
    assert held_out[0].shape == (3, 4, 1)
    folder(tmp_path / "val", ("d",), 1)
    with pytest.raises(ValueError, match="'d' is held out but has no picture"):
        open_images(str(tmp_path))


def test_wrong_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of pictures"):
        image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_images(str(tmp_path / "nowhere"))
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    with pytest.raises(ValueError, match="no uncompressed tar"):
        tar_members(tmp_path / "a.tar")
    for name in ("nowhere.tar", "nowhere.npz"):
        with pytest.raises(FileNotFoundError, match="no file"):
            open_images(str(tmp_path / name))


def test_arrays_of_an_npz_are_a_set(tmp_path):
    pixels, labels = np.zeros((4, 5, 6), np.uint8), np.array([0, 1, 2, 1])
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels[:1], y_test=labels[:1])
    train, test = open_images(str(tmp_path / "a.npz"))
    assert train[0].shape == (5, 6, 1)
    assert (train.classes, len(test)) == (("0", "1", "2"), 1)
    np.savez(tmp_path / "a.npz", train_images=pixels)
    with pytest.raises(ValueError, match="no array 'train_labels'"):
        mnist(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x_train=pixels / 1, y_train=labels, x_test=pixels, y_test=labels)
    with pytest.raises(ValueError, match=r"got float64 \[4, 5, 6, 1\]"):
        mnist(tmp_path / "a.npz")


def test_a_split_holds_the_same_share_of_every_class():
    images = drawn_shapes(80, seed=1)
    train, held_out = images.split(0.25)
    assert np.bincount(held_out.labels).tolist() == [5, 5, 5, 5]
    assert len(train) == 60
    np.testing.assert_array_equal(train.labels, images.split(0.25)[0].labels)
    assert (held_out.sources != images.split(0.25, seed=1)[1].sources).any()


def test_a_contact_sheet_shows_all(tmp_path):
    sheet = contact_sheet([COLOURS, COLOURS, COLOURS[..., :1]], columns=2, gap=1)
    assert sheet.shape == (7, 9, 3)
    np.testing.assert_array_equal(sheet[1:3, 1:4], COLOURS)
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([], 2)
    with pytest.raises(ValueError, match="must have one size"):
        contact_sheet([COLOURS, COLOURS[:1]], 2)


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="the digits come with scikit-learn")
def test_the_digits_of_scikit_learn_are_there():
    images = digits()
    assert images.sources.shape == (1797, 8, 8, 1)
    assert images.sources.max() == 255
    assert np.bincount(images.labels).min() == 174


def test_a_missing_scikit_learn_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"rookery\[vision\]"):
        digits()


@pytest.mark.data
def test_the_shared_sets_are_read():
    train, test = mnist(shared("vision/mnist.npz"))
    assert (len(train), len(test), train[0].shape) == (60000, 10000, (28, 28, 1))
    train, test = (tar_images(shared("vision/cifar10_jpeg_15k_3k.tar"), part) for part in ("train", "test"))
    assert (len(train), len(test), train[0].shape) == (15000, 3000, (32, 32, 3))
    assert train.classes[train.labels[0]] == "airplane"
    emoji = noto_emoji(shared("vision/emoji_72px.tar"), shared("vision/emoji_captions.json"))
    assert emoji[0].caption == "grinning face"
    assert emoji[0].pixels()[0, 0].tolist() == [255, 255, 255]


@pytest.mark.data
def test_emoji_of_four_vendors_are_the_same_things():
    folder = shared("vision/emoji_vendors")
    found = vendor_emoji(folder)
    assert {vendor: len(emoji) for vendor, emoji in found.items()} == dict.fromkeys(VENDORS, 1014)
    assert len({tuple(e.caption for e in emoji) for emoji in found.values()}) == 1
    assert sum(bool(emoji.tags) for emoji in found["apple"]) == 1003
    custard = next(emoji for emoji in found["google"] if emoji.caption == "custard")
    assert custard.tags[:2] == ("custard", "dessert")
    assert custard.pixels().shape == (32, 32, 3)
