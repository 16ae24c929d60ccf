import json

import pytest
from support.files import tiny

from rookery.data.image_input import plain_input
from rookery.data.images import drawn_shapes, save_image
from rookery.evaluate.images import Classifier, evaluate
from rookery.models import create_model, save_model


@pytest.fixture
def files(tmp_path):
    """Two pictures, and a classifier of ten classes that names them."""
    names = json.dumps([f"thing {i}" for i in range(10)])
    metadata = {"classes": names} | plain_input(16, 3).metadata()
    save_model(create_model("vision-rwkv-test", seed=1), tmp_path / "m.safetensors", metadata=metadata)
    for i in range(2):
        save_image(drawn_shapes(2)[i], tmp_path / f"{i}.png", scale=2)
    return tmp_path


def test_pictures_are_named_one_a_line(cli, files):
    code, said, _ = cli("classify", files / "0.png", files / "1.png", "--model", files / "m.safetensors", "--top", "2")
    assert code == 0
    lines = said.splitlines()
    assert [line.split(": thing ")[0] for line in lines] == [str(files / f"{i}.png") for i in range(2)]
    assert all(line.count("%") == 2 for line in lines)


def test_json_has_all_the_names(cli, files):
    code, said, _ = cli("classify", files / "0.png", "--model", files / "m.safetensors", "--json", "--top", "99")
    assert code == 0
    found = json.loads(said)
    assert len(found["classes"]) == 10
    assert sum(found["classes"].values()) == pytest.approx(1, abs=1e-5)


def test_what_cannot_classify_is_refused(cli, files):
    code, _, said = cli("classify", files / "nowhere.png", "--model", files / "m.safetensors")
    assert (code, "there is no picture" in said) == (1, True)
    save_model(create_model("rwkv7-test"), files / "text.safetensors")
    code, _, said = cli("classify", files / "0.png", "--model", files / "text.safetensors")
    assert (code, "kind 'language'; classifying needs one of images" in said) == (1, True)
    save_model(create_model("vision-rwkv-test", num_classes=0), files / "none.safetensors")
    code, _, said = cli("classify", files / "0.png", "--model", files / "none.safetensors")
    assert (code, "has no classes" in said) == (1, True)
    code, _, said = cli("classify", files / "0.png", "--model", files / "m.safetensors", "--top", "0")
    assert (code, "top must be at least 1" in said) == (1, True)


def test_classes_without_names_are_numbered(tmp_path):
    save_model(tiny("vision-rwkv-test"), tmp_path / "m.safetensors")
    assert Classifier.open(tmp_path / "m.safetensors").classes[9] == "class 9"


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="no picture to evaluate"):
        evaluate(create_model("vision-rwkv-test"), drawn_shapes(0), plain_input(16, 3))
