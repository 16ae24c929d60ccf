"""The pipeline and the model that is shipped: it is true that …"""

import json

import numpy as np
import pytest
import torch
from support.diffusion import randomised, texts

from rookery.errors import BadCheckpoint
from rookery.imaging.pipeline import DIR7Pipeline
from rookery.models import create_model, save_model


@pytest.fixture(scope="module")
def pipeline():
    return DIR7Pipeline(randomised("dir-7-test", dtype=torch.float32))


def draw(pipeline, prompt="a three", **given):
    return pipeline(prompt, **{"num_inference_steps": 3, "generator": 0, "output_type": "np", **given}).images


def test_pictures_come_in_three_forms(pipeline):
    arrays, tensors, pictures = (draw(pipeline, output_type=kind) for kind in ("np", "pt", "pil"))
    assert (arrays.shape, arrays.dtype) == ((1, 8, 8, 1), np.float32)
    assert arrays.min() >= 0
    assert arrays.max() <= 1
    np.testing.assert_array_equal(tensors.movedim(1, 3).numpy(), arrays)
    assert [(p.mode, p.size) for p in pictures] == [("L", (8, 8))]
    np.testing.assert_array_equal(np.asarray(pictures[0]), np.rint(arrays[0, ..., 0] * 255))


def test_rows_prompts_sizes_and_seeds(pipeline):
    many = draw(pipeline, ["one", "two"], num_images_per_prompt=3, height=5, width=11)
    assert many.shape == (6, 5, 11, 1)
    assert np.array_equal(many, draw(pipeline, ["one", "two"], num_images_per_prompt=3, height=5, width=11))
    assert not np.array_equal(draw(pipeline), draw(pipeline, generator=1))
    assert not np.array_equal(draw(pipeline), draw(pipeline, "a two"))
    assert not np.array_equal(draw(pipeline), draw(pipeline, negative_prompt="a two"))
    given = torch.Generator().manual_seed(0)
    assert np.array_equal(draw(pipeline), draw(pipeline, generator=given))
    assert not np.array_equal(draw(pipeline), draw(pipeline, generator=given))  # it has gone on


@pytest.mark.parametrize("cross", ["text_kv", "text_read", "text_r", "softmax"])
def test_a_cached_prompt_draws_the_same(cross):
    pipeline = DIR7Pipeline(randomised("dir-7-test", dtype=torch.float32, cross=cross))
    kept = pipeline.cache_prompt("a three")
    assert np.array_equal(draw(pipeline, kept), draw(pipeline))
    assert draw(pipeline, kept, num_images_per_prompt=2).shape[0] == 2


def test_a_folder_comes_back_with_its_scheduler(pipeline, tmp_path):
    DIR7Pipeline(pipeline.model, scheduler="dpm++").save_pretrained(tmp_path / "p")
    back = DIR7Pipeline.from_pretrained(tmp_path / "p")
    assert back.scheduler == "dpm++"
    assert not np.array_equal(draw(back), draw(pipeline))
    assert DIR7Pipeline.from_pretrained(tmp_path / "p/model.safetensors").scheduler == "ddim"
    (tmp_path / "p/pipeline.json").write_text("{]")
    with pytest.raises(BadCheckpoint, match=r"pipeline\.json' does not name a scheduler"):
        DIR7Pipeline.from_pretrained(tmp_path / "p")


class Enlarging:
    """A decoder that makes every latent two pixels wide."""

    factor, scale = 2, 0.5

    def decode(self, latents):
        return (latents * 0.1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_encoders_and_decoders_of_others_fit():
    model = randomised("dir-7-read-test", dtype=torch.float32)
    asked = []

    def encoder(prompts):
        asked.append(prompts)
        return texts(*(2 for _ in prompts))

    pipeline = DIR7Pipeline(model, encoder, vae=Enlarging())
    assert draw(pipeline, "anything").shape == (1, 16, 16, 1)
    assert draw(pipeline, "anything", height=6, width=10).shape == (1, 6, 10, 1)
    assert asked == [["anything"]] * 2
    with pytest.raises(ValueError, match="height and width must be multiples of 2 above 0, got 7 and 16"):
        draw(pipeline, "anything", height=7)


def test_what_cannot_be_drawn_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="output_type is one of pil, np, pt; got 'jpg'"):
        draw(pipeline, output_type="jpg")
    with pytest.raises(ValueError, match="above 0, got -3 and 8"):
        draw(pipeline, height=-3)
    with pytest.raises(ValueError, match="num_images_per_prompt must be at least 1, got 0"):
        draw(pipeline, num_images_per_prompt=0)
    with pytest.raises(ValueError, match="2 negative prompts for 3 images"):
        draw(pipeline, num_images_per_prompt=3, negative_prompt=["one", "two"])
    with pytest.raises(ValueError, match="steps go from 1 to 50"):
        draw(pipeline, num_inference_steps=51)
    with pytest.raises(ValueError, match="this model reads no text"):
        draw(DIR7Pipeline(create_model("dir-7-none-test", text_buckets=9, pooled_text=False)))
    with pytest.raises(ValueError, match="do not fit the straight line of a flow"):
        DIR7Pipeline(create_model("dir-7-softmax-test"), scheduler="ddpm")
    save_model(create_model("diffusion-rwkv-test"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is a diffusion-rwkv model; texts are drawn by dir-7"):
        DIR7Pipeline.from_pretrained(tmp_path / "m.safetensors")
    long = DIR7Pipeline(randomised("dir-7-test", dtype=torch.float32, cross="text_r"))
    with pytest.raises(ValueError, match="the text has 17 tokens and the image 16"):
        draw(long, "one " * 17)
    assert json.dumps(long.scheduler) == '"ddim"'
