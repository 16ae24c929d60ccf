import io
import json
import tarfile

import numpy as np
import pytest

from rookery.data.captions import Pair, TextChoice, all_texts, read_pairs
from rookery.data.images import save_image

pytest.importorskip("PIL")

RED = np.full((3, 4, 3), (255, 0, 0), np.uint8)


@pytest.fixture
def folder(tmp_path):
    save_image(RED, tmp_path / "red.png")
    return tmp_path


def jsonl(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def test_lines_of_json_are_pairs_beside_their_file(folder):
    rows = [
        {"image": "red.png", "caption": " a red thing ", "tags": ["red", ""], "group": "r"},
        {"image": "red.png", "raw": "IMG_1", "synthetic": "red", "generated": "", "tags": "red, square"},
    ]
    first, second = read_pairs(jsonl(folder, *rows))
    assert first.texts == {"raw": "a red thing", "tags": ("red",)}
    assert first.group == "r"
    np.testing.assert_array_equal(first.pixels(), RED)
    assert second.texts == {"raw": "IMG_1", "synthetic": "red", "tags": ("red", "square")}
    assert all_texts([second]) == ["IMG_1", "red", "red square"]


def test_tables_are_pairs(folder):
    (folder / "a.csv").write_text('filepath,title\nred.png,"one, two"\n')
    (folder / "a.tsv").write_text("image\tcaption\nred.png\tone\n")
    assert read_pairs(folder / "a.csv")[0].texts == {"raw": "one, two"}
    assert read_pairs(folder / "a.tsv")[0].texts == {"raw": "one"}


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_a_webdataset_with_one_key_are_a_pair(folder):
    picture = (folder / "red.png").read_bytes()
    members = {
        "a/0.png": picture,
        "a/0.txt": b"zero",
        "a/0.json": json.dumps({"synthetic": "made", "group": 7}).encode(),
        "a/1.png": picture,
        "a/1.txt": b"one",
    }
    first, second = read_pairs(archive(folder / "a.tar", members))
    assert first.texts == {"raw": "zero", "synthetic": "made"}
    assert first.group == "7"
    assert second.pixels().shape == (3, 4, 3)


def test_pictures_without_a_text_are_left_out_and_said(folder, caplog):
    pairs = read_pairs(jsonl(folder, {"image": "red.png"}, {"image": "red.png", "raw": "x"}, {"image": "b", "raw": ""}))
    assert [pair.texts for pair in pairs] == [{"raw": "x"}]
    assert "2 of 3 pictures have no text" in caplog.text


def test_what_cannot_be_read_is_refused_with_its_place(folder):
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_pairs(jsonl(folder, {"image": "red.png", "raw": "x"}, "{"))
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        read_pairs(jsonl(folder, [1]))
    with pytest.raises(ValueError, match="line 1: no picture"):
        read_pairs(jsonl(folder, {"raw": "x"}))
    with pytest.raises(ValueError, match="no picture with a text"):
        read_pairs(jsonl(folder, {"image": "red.png"}))
    with pytest.raises(FileNotFoundError, match="no file"):
        read_pairs(folder / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"pairs are read from \.jsonl"):
        read_pairs(folder / "red.png")
    with pytest.raises(ValueError, match="sample '0': no picture among .txt"):
        read_pairs(archive(folder / "a.tar", {"0.txt": b"x"}))
    with pytest.raises(ValueError, match=r"sample '0': its \.json cannot be read"):
        read_pairs(archive(folder / "a.tar", {"0.png": b"x", "0.json": b"{"}))


PAIR = Pair(RED, {"raw": "r", "synthetic": "s", "generated": "g"})


def test_each_text_is_drawn_as_often_as_the_others():
    generator, choice = np.random.default_rng(0), TextChoice.of("uniform")
    drawn = [choice.draw(PAIR, generator) for _ in range(3000)]
    for text in "rsg":
        assert abs(drawn.count(text) / 3000 - 1 / 3) < 0.03


def test_weights_choose_texts_and_the_others_stand_in():
    generator = np.random.default_rng(0)
    drawn = [TextChoice.of("raw=3,generated=1").draw(PAIR, generator) for _ in range(400)]
    assert set(drawn) == {"r", "g"}
    assert abs(drawn.count("r") / 400 - 0.75) < 0.08
    assert TextChoice.of("raw").draw(PAIR, generator) == "r"
    assert TextChoice.of("raw").draw(Pair(RED, {"synthetic": "s"}), generator) == "s"


def test_tags_are_drawn_in_part_and_in_any_order():
    generator = np.random.default_rng(0)
    drawn = {TextChoice.of("tags").draw(Pair(RED, {"tags": ("a", "b")}), generator) for _ in range(100)}
    assert drawn == {"a", "b", "a b", "b a"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("rwa", "no text of kind 'rwa'"), ("raw=x", "weights of texts are numbers"), ("raw=0", "not all 0")],
)
def test_a_choice_of_no_text_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        TextChoice.of(text)
