import numpy as np
import pytest
import torch
from support.diffusion import randomised

from rookery.data.images import read_image
from rookery.models import create_model, save_model


@pytest.fixture
def model(tmp_path):
    made = randomised("dir-7-test", dtype=torch.float32)
    made.keep_words(["three", "two"])
    save_model(made, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_texts_are_rows_of_a_grid(cli, model, tmp_path):
    out = tmp_path / "grid.png"
    code, said, talk = cli("imagine", "three", "2", "-o", out, "--model", model, "--count", "3", "--steps", "2")
    assert (code, said) == (0, f"{out}\n")
    assert "2 × 3 pictures of 8 × 8" in talk
    picture = read_image(out)
    assert picture.shape == (4 + 2 * 68, 4 + 3 * 68, 3)  # zoomed to 64, with gaps of 4
    again = tmp_path / "again.png"
    settings = ("--model", model, "--count", "3", "--steps", "2", "--sampler", "ddim", "--seed", "0", "--zoom", "8")
    assert cli("imagine", "three", "two", "-o", again, *settings)[0] == 0
    np.testing.assert_array_equal(read_image(again), picture)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["xylophone"], "the model has learned none of the words of 'xylophone'"),
        (["three", "--count", "0"], "--count goes from 1 to 1000, got 0"),
        (["three", "--zoom", "0"], "--zoom goes from 1 to 64, got 0"),
        (["three", "--steps", "0"], "steps go from 1 to 50, the model's noise levels; got 0"),
        (["three", "--height", "-2"], "height and width must be multiples of 1 above 0, got -2 and 8"),
        (["three", "--sampler", "euler"], "euler is for models that predict a flow; this one predicts 'eps'"),
        (["three", "--steps", "2", "-o", "grid.xyz"], "a picture's name ends in one of"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(cli, model, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("imagine", "--model", model, *words)
    assert (code, out) == (1, "")
    assert message in err


def test_other_models_and_files_are_refused(cli, tmp_path):
    save_model(create_model("rwkv7-test"), tmp_path / "text.safetensors")
    code, _, err = cli("imagine", "three", "--model", tmp_path / "text.safetensors")
    assert (code, "is a rwkv7 model; texts are drawn by dir-7" in err) == (1, True)
    code, _, err = cli("imagine", "three", "--model", tmp_path / "nowhere.safetensors")
    assert code == 1
    assert "nowhere.safetensors" in err


def test_the_model_that_is_shipped_draws_in_other_sizes_and_tells_unknown_words(cli, tmp_path):
    out = tmp_path / "grid.png"
    assert cli("imagine", "three", "-o", out, "--count", "2", "--steps", "2", "--height", "12", "--width", "9")[0] == 0
    code, _, said = cli("imagine", "cat", "-o", out)
    assert (code, "the model has learned none of the words of 'cat'" in said) == (1, True)
