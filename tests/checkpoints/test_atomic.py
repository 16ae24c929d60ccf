"""A file that is written is whole or absent."""

import os
import stat

import pytest

from rookery.checkpoints.atomic import replacing


def test_the_file_takes_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_goes_wrong_leaves_the_old_file(tmp_path, interruption):
    path = tmp_path / "model.bin"
    path.write_text("old")
    with pytest.raises(type(interruption)), replacing(path) as temporary:
        temporary.write_text("half")
        raise interruption
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_a_failure_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="no good"), replacing(tmp_path / "model.bin"):
        raise ValueError("no good")
    assert os.listdir(tmp_path) == []


def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "usual").write_text("")
    with replacing(str(tmp_path / "ours")) as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"cannot write '.*model\.bin': there is no folder '.*nowhere'; make it"),
        replacing(tmp_path / "nowhere" / "model.bin"),
    ):
        pass
