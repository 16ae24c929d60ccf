import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.data.image_input import CLIP
from rookery.data.images import drawn_shapes, read_image
from rookery.errors import BadTokenizer
from rookery.evaluate.retrieval import (
    Embedder,
    build_zero_shot_classifier,
    retrieval_metrics,
    search,
    search_sheet,
    squared,
    write_vectors,
)
from rookery.models import create_model, save_model
from rookery.tokenizers.texts import TextInput, word_tokenizer


def test_recall_counts_those_among_the_first():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]])
    found = retrieval_metrics(similarity, ks=(1, 2))
    # image 1 finds its text second; text 1 its image first, text 2 shares the first place with image 1
    assert found["image to text R@1"] == pytest.approx(2 / 3)
    assert found["image to text R@2"] == 1
    assert found["text to image R@1"] == pytest.approx(2 / 3)
    assert found["text to image R@2"] == 1


def test_ties_count_as_lost():
    found = retrieval_metrics(torch.zeros(4, 4), ks=(1, 3, 4))
    assert [found[f"{way} R@{k}"] for way in ("image to text", "text to image") for k in (1, 3, 4)] == [0, 0, 1] * 2
    # integers, which cut off what tells similarities apart, would tie here
    assert retrieval_metrics(torch.tensor([[0.2, 0.1], [0.1, 0.2]]))["image to text R@1"] == 1


def test_any_of_several_texts_of_an_image_is_right():
    similarity = torch.tensor([[0.1, 0.8, 0.5], [0.2, 0.3, 0.9]])
    found = retrieval_metrics(similarity, image_of_text=[0, 0, 1], ks=(1,))
    assert found == {"image to text R@1": 1.0, "text to image R@1": pytest.approx(2 / 3)}
    alone = retrieval_metrics(similarity, image_of_text=[0, 0, 0], ks=(1,))
    assert alone["image to text R@1"] == 1  # the image without a text is not asked


def test_a_random_matrix_agrees_with_sorting():
    similarity = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    places = similarity.argsort(1, descending=True)
    hits = (places[:, :5] == torch.arange(30)[:, None]).any(1).float().mean()
    assert retrieval_metrics(similarity)["image to text R@5"] == pytest.approx(hits.item())


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="image_of_text must name one of 2 images for each of 3 texts"):
        retrieval_metrics(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one of 2 images"):
        retrieval_metrics(torch.zeros(2, 3), [0, 1, 2])
    with pytest.raises(ValueError, match="finite"):
        retrieval_metrics(torch.full((2, 2), torch.nan))


@pytest.fixture
def model_file(tmp_path):
    tokenizer = word_tokenizer(["a red disc and a square"])
    model = randomised("rwkv-clip-test", dtype=torch.float32)
    save_model(model, tmp_path / "m.safetensors", metadata={"text_tokenizer": tokenizer.to_json()})
    return tmp_path / "m.safetensors"


def test_an_embedder_gives_vectors_of_length_one(model_file):
    embedder = Embedder.open(str(model_file))
    assert (embedder.want.mean, embedder.want.size) == (CLIP[0], 16)
    shapes = drawn_shapes(5)
    images = embedder.images([shapes[i] for i in range(5)], batch_size=2)
    texts = embedder.embed_texts(["a disc", "a square", "a disc"], batch_size=2)
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(8))
    torch.testing.assert_close(texts[0], texts[2])
    assert embedder.images([]).shape == (0, 32)
    assert embedder.embed_texts([]).shape == (0, 32)


def test_files_that_cannot_embed_say_why(tmp_path, model_file):
    save_model(create_model("rwkv-clip-test"), tmp_path / "mute.safetensors")
    with pytest.raises(BadTokenizer, match="brings no tokenizer"):
        Embedder.open(str(tmp_path / "mute.safetensors")).embed_texts(["x"])
    save_model(create_model("rwkv7-test"), tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="kind 'language'; embedding needs one of images and texts"):
        Embedder.open(str(tmp_path / "text.safetensors"))


def test_templates_that_are_equal_count_as_one():
    model = randomised("rwkv-clip-test", dtype=torch.float32).eval()
    words = word_tokenizer(["a photo of a cat dog"])
    texts = TextInput(words, 60, 9)
    one = build_zero_shot_classifier(model, texts, ["cat", "dog"], ["a photo of a {}"])
    three = build_zero_shot_classifier(model, texts, ["cat", "dog"], ["a photo of a {}"] * 3)
    assert one.shape == (32, 2)
    torch.testing.assert_close(one, three)
    torch.testing.assert_close(one.norm(dim=0), torch.ones(2))
    with pytest.raises(ValueError, match="at least one class and one template"):
        build_zero_shot_classifier(model, texts, [])


def test_a_search_gives_the_nearest_and_a_sheet_of_them(tmp_path):
    images = torch.eye(4)
    found = search(images, torch.tensor([[0.1, 0.9, 0.3, 0.0]]), 2)
    assert [place for place, _ in found[0]] == [1, 2]
    shapes = drawn_shapes(4)
    search_sheet(tmp_path / "s.png", [shapes[i] for i in range(4)], ["a square"], found, side=20)
    assert read_image(tmp_path / "s.png").shape == (16 + 20 + 8 + 4, 4 + 2 * 24 + 4, 3)
    assert squared(np.zeros((1, 9, 3), np.uint8), 18).shape == (18, 18, 3)
    write_vectors(tmp_path / "v.npz", ["a", "b"], images[:2], ["x"], images[3:])
    with np.load(tmp_path / "v.npz") as kept:
        assert kept["names"].tolist() == ["a", "b"]
        np.testing.assert_array_equal(kept["text_features"], [[0, 0, 0, 1]])
