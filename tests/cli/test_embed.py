import json

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.data.images import drawn_shapes, read_image, save_image
from rookery.models import save_model
from rookery.tokenizers.texts import word_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = word_tokenizer(["a red disc and a square"]).to_json()
    model = randomised("rwkv-clip-test", dtype=torch.float32)
    save_model(model, tmp_path / "m.safetensors", metadata={"text_tokenizer": tokenizer})
    (tmp_path / "photos").mkdir()
    for i in range(3):
        save_image(drawn_shapes(3)[i], tmp_path / "photos" / f"{i}.png")
    return tmp_path


def test_pictures_are_found_by_words_and_drawn(cli, folder):
    sheet = folder / "found.png"
    code, said, _ = cli(
        "embed", folder / "photos", "--text", "a disc", "--text", "red", "--model", folder / "m.safetensors",
        "--top", "2", "--sheet", sheet,
    )  # fmt: skip
    assert code == 0
    lines = said.splitlines()
    assert [lines[0], lines[3]] == ["a disc:", "red:"]
    assert float(lines[1].split()[0]) >= float(lines[2].split()[0])
    assert read_image(sheet).shape[1] > 144


def test_vectors_are_written(cli, folder):
    out = folder / "v.npz"
    code, said, _ = cli("embed", folder / "photos", "--model", folder / "m.safetensors", "--out", out)
    assert (code, said) == (0, "")
    with np.load(out) as kept:
        assert kept["images"].shape == (3, 32)
        assert kept["texts"].shape == (0,)
        assert kept["names"][2].endswith("2.png")


def test_json_names_pictures_with_their_similarity(cli, folder):
    one = folder / "photos" / "0.png"
    code, said, _ = cli("embed", one, "--model", folder / "m.safetensors", "--text", "red", "--json")
    assert code == 0
    found = json.loads(said)
    assert found["text"] == "red"
    assert -1 <= found["images"][str(one)] <= 1


def test_nothing_to_do_and_nothing_to_read_are_refused(cli, folder):
    (folder / "empty").mkdir()
    model = folder / "m.safetensors"
    for arguments, reason in (
        (["photos"], "nothing to do: give --text"),
        (["empty", "--text", "x"], "there is no picture in"),
        (["photos", "--text", "x", "--top", "0"], "--top must be at least 1"),
    ):
        code, _, said = cli("embed", folder / arguments[0], *arguments[1:], "--model", model)
        assert (code, reason in said) == (1, True)


def test_pictures_are_described_by_rule(cli, folder):
    (folder / "in.jsonl").write_text(json.dumps({"image": "a.png", "raw": "Rex", "tags": ["dog"]}))
    code, said, _ = cli("data", "describe", folder / "in.jsonl", "--out", folder / "out.jsonl")
    assert (code, "1 kept" in said) == (0, True)
    assert json.loads((folder / "out.jsonl").read_text())["generated"] == "Rex, with dog"
