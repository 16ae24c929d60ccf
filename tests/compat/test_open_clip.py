import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.compat import open_clip
from rookery.data.images import drawn_shapes
from rookery.errors import BadTokenizer
from rookery.models import create_model, save_model
from rookery.tokenizers.texts import word_tokenizer

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def file(tmp_path):
    tokenizer = word_tokenizer(["a photo of a disc square"]).to_json()
    model = randomised("rwkv-clip-test", dtype=torch.float32)
    save_model(model, tmp_path / "m.safetensors", metadata={"text_tokenizer": tokenizer})
    return str(tmp_path / "m.safetensors")


def test_the_example_of_open_clip_runs(file):
    model, train, preprocess = open_clip.create_model_and_transforms("rwkv-clip", pretrained=file)
    tokenizer = open_clip.get_tokenizer(file)
    picture = Image.fromarray(drawn_shapes(1, size=40)[0][..., 0])
    image, text = preprocess(picture)[None], tokenizer(["a disc", "a square"])
    assert image.shape == train(picture)[None].shape == (1, 3, 16, 16)
    assert text.shape == (2, 9)
    image_features, text_features, scale = model(image, text)
    chances = (scale * image_features @ text_features.T).softmax(-1)
    assert chances.shape == (1, 2)
    torch.testing.assert_close(model.encode_image(image, normalize=True), image_features)
    assert model.logit_scale.shape == ()
    assert open_clip.get_tokenizer(file, context_length=5)("a disc").shape == (1, 5)


def test_templates_may_be_functions(file):
    model, _, _ = open_clip.create_model_and_transforms("rwkv-clip", pretrained=file)
    tokenizer, names = open_clip.get_tokenizer(file), ["disc", "square"]
    by_text = open_clip.build_zero_shot_classifier(model, tokenizer, names, ["a photo of a {}"])
    by_call = open_clip.build_zero_shot_classifier(model, tokenizer, names, [lambda name: f"a photo of a {name}"])
    torch.testing.assert_close(by_text, by_call)


def test_fresh_models_are_made_by_name_and_in_any_precision():
    assert {"rwkv-clip-b32", "rwkv-clip-nano"} <= set(open_clip.list_models())
    model, _, preprocess = open_clip.create_model_and_transforms("rwkv-clip-test", precision="bf16")
    assert model.logit_scale.dtype == torch.bfloat16
    assert preprocess(np.zeros((5, 9, 4), np.uint8)).shape == (3, 16, 16)


def test_what_is_no_pair_or_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'rwkv7-test' is no model of images and texts"):
        open_clip.create_model_and_transforms("rwkv7-test")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16"):
        open_clip.create_model_and_transforms("rwkv-clip-test", precision="int8")
    save_model(create_model("rwkv-clip-test"), tmp_path / "mute.safetensors")
    with pytest.raises(BadTokenizer, match="brings no tokenizer; give CLIP's file"):
        open_clip.get_tokenizer(str(tmp_path / "mute.safetensors"))
