"""Real data is found, or its source named: it is true that …"""

import pytest

from rookery.data.locate import MissingData, data_folder, locate, sources


def test_files_are_found_in_the_folder_given(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    assert locate("text/a.txt", folder=tmp_path) == [tmp_path / "text/a.txt"]


def test_the_usual_folders_are_tried(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert data_folder() is None
    (tmp_path / "shared/data").mkdir(parents=True)
    assert data_folder().resolve() == tmp_path / "shared/data"


def test_what_is_missing_is_named_with_its_source(tmp_path, monkeypatch):
    with pytest.raises(MissingData) as caught:
        locate("text/tinyshakespeare.txt", "mine.txt", folder=tmp_path)
    said = str(caught.value)
    assert (
        f"the data folder {str(tmp_path)!r} lacks text/tinyshakespeare.txt (from github.com/karpathy/char-rnn" in said
    )
    assert "1115394 bytes, public domain text); mine.txt (no known source)" in said
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingData, match="no data folder .* do not exist"):
        locate("text/tinyshakespeare.txt")


def test_a_folder_that_does_not_exist_is_refused():
    with pytest.raises(FileNotFoundError, match="there is no data folder 'nowhere'"):
        data_folder("nowhere")


def test_every_source_is_whole():
    assert len(sources()) > 50
    assert all(all(row.values()) for row in sources().values())
