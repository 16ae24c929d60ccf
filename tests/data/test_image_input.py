import numpy as np
import pytest
import torch

from rookery.data.augment import Augment, changed, erased, moved, part_of, rectangle
from rookery.data.image_input import ImageInput, image_input, plain_input
from rookery.families.vision_rwkv import PRESETS

pytest.importorskip("PIL")


def random_pixels(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 3), (40, 57), (224, 300), (16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_shape_are_brought_to_size(shape, channels):
    want = ImageInput(size=16, channels=channels)
    prepared = want.prepare(random_pixels(*shape, channels))
    assert prepared.shape == (16, 16, channels)
    assert prepared.dtype == np.uint8


def test_the_middle_of_the_shorter_side_is_kept():
    pixels = np.zeros((32, 64, 1), np.uint8)
    pixels[:, 16:48] = 255  # the square in the middle
    assert (plain_input(16, 1).prepare(pixels)[:, 2:-2] == 255).all()
    cropped = ImageInput(size=16, channels=1, crop=0.5).prepare(pixels)
    assert (cropped == 255).all()


def test_values_are_normalised_by_channel():
    want = ImageInput(size=2, mean=(0.0, 0.5, 1.0), deviation=(1.0, 0.5, 2.0))
    values = want.normalised(np.full((1, 2, 2, 3), 255, np.uint8))
    assert values.dtype == torch.float32
    assert values[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]


def test_a_file_says_how_it_wants_pictures_and_others_want_imagenets_figures():
    want = ImageInput(size=20, channels=1, mean=(0.25,), deviation=(0.5,), crop=1.0)
    assert image_input(PRESETS["tiny"], want.metadata()) == want
    assert image_input(PRESETS["tiny"], {}) == ImageInput()


def test_moving_fills_with_zeros():
    pixels = random_pixels(4, 5)
    shifted = moved(pixels, 1, -2)
    np.testing.assert_array_equal(shifted[1:, :3], pixels[:3, 2:])
    assert not shifted[0].any()
    assert not shifted[:, 3:].any()
    assert not moved(pixels, 4, 0).any()
    np.testing.assert_array_equal(moved(pixels, 0, 0), pixels)


def test_rectangles_lie_inside_and_have_their_area():
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        top, left, bottom, right = rectangle(40, 60, 0.25, 2.0, generator)
        assert 0 <= top < bottom <= 40
        assert 0 <= left < right <= 60
        areas.append((bottom - top) * (right - left) / 2400)
    assert np.mean(areas) == pytest.approx(0.25, abs=0.02)
    assert rectangle(1, 1, 0.01, 1.0, generator) == (0, 0, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_change_keeps_size_and_type(channels):
    pixels, generator = random_pixels(9, 12, channels), np.random.default_rng(0)
    for result in (
        *(changed(pixels, 0.9, generator) for _ in range(60)),
        erased(pixels, generator),
    ):
        assert result.shape == pixels.shape
        assert result.dtype == np.uint8
    assert part_of(pixels, Augment(area=0.1), 7, generator).shape == (7, 7, channels)


def test_a_picture_is_a_function_of_its_generator():
    how = Augment(area=0.3, flip=True, move=2, operations=2, erase=0.5)
    want = ImageInput(size=8)
    one, same = (how.picture(random_pixels(20, 30), want, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_blended_targets_have_the_share_of_the_pixels(kind):
    images = torch.stack([torch.zeros(1, 10, 10), torch.ones(1, 10, 10)])
    targets = torch.eye(2)
    blended, shares = Augment(**{kind: 1.0}).blend(images, targets, np.random.default_rng(1))
    torch.testing.assert_close(blended.mean((1, 2, 3)), shares[:, 1])
    assert 0 < float(shares[0, 0]) < 1
    same, _ = Augment().blend(images, targets, np.random.default_rng(1))
    assert same is images
