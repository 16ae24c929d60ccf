import json

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.cli.main import main
from rookery.data.image_input import plain_input
from rookery.data.images import drawn_shapes, save_image
from rookery.evaluate.pictures import run, some
from rookery.models import create_model, save_model
from rookery.tokenizers.texts import word_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Shapes in folders by class and as pairs, a classifier of them and an RWKV-CLIP."""
    shapes, rows = drawn_shapes(12), []
    for i in range(12):
        name = shapes.classes[shapes.labels[i]]
        (tmp_path / "shapes" / name).mkdir(parents=True, exist_ok=True)
        save_image(shapes[i], tmp_path / "shapes" / name / f"{i}.png")
        rows.append({"image": f"shapes/{name}/{i}.png", "raw": f"a {name} {i}", "tags": [name]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = json.dumps(sorted(shapes.classes))
    metadata = {"classes": names} | plain_input(16, 3).metadata()
    classifier = create_model("vision-rwkv-test", num_classes=4, seed=1)
    save_model(classifier, tmp_path / "classes.safetensors", metadata=metadata)
    words = word_tokenizer([row["raw"] for row in rows]).to_json()
    towers = randomised("rwkv-clip-test", dtype=torch.float32)
    save_model(towers, tmp_path / "clip.safetensors", metadata={"text_tokenizer": words})
    return tmp_path


def test_each_kind_of_model_has_its_measure(folder):
    data = str(folder / "shapes")
    found = run("images", folder / "classes.safetensors", data)
    assert found["pictures"] == 4
    assert 0 <= found["accuracy"] <= 1
    found = run("zero-shot", folder / "clip.safetensors", data, limit=2)
    assert found["pictures"] == 2
    assert found["among the first five"] == 1
    found = run("retrieval", folder / "clip.safetensors", str(folder / "pairs.jsonl"), limit=10)
    assert set(found["raw"]) == {f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)}
    assert found["raw"]["image to text R@10"] == 1
    assert found["tags"]["text to image R@1"] < 1  # tags are alike: ties are lost


def test_the_command_prints_them(folder, capsys):
    arguments = [str(folder / "shapes"), "--model", str(folder / "classes.safetensors")]
    assert main(["eval", "images", *arguments]) == 0
    assert "pictures 4\n" in capsys.readouterr().out
    assert main(["eval", "zero-shot", str(folder / "shapes")]) == 1
    assert "needs data and a model" in capsys.readouterr().err


def test_classes_that_the_model_does_not_know_are_refused(folder):
    (folder / "shapes" / "disc").rename(folder / "shapes" / "circle")
    with pytest.raises(ValueError, match=r"the model knows 4 classes \(cross …\), the pictures are of 4 \(circle …\)"):
        run("images", folder / "classes.safetensors", str(folder / "shapes"))


def test_a_limit_takes_pictures_from_all_over():
    assert some(9, 3).tolist() == [0, 4, 8]
    assert some(3, None).tolist() == [0, 1, 2]
    assert some(0, 5).dtype == np.int64
