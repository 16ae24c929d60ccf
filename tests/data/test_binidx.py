"""Token files: it is true that …"""

import struct

import numpy as np
import pytest

from rookery.data.binidx import BinIdx, BinIdxWriter

DOCUMENTS = [[5, 6, 0], [0], [], [65535, 1, 2, 3, 0]]


@pytest.fixture
def path(tmp_path):
    with BinIdxWriter(tmp_path / "folder" / "tokens", 65536) as writer:
        for tokens in DOCUMENTS:
            writer.add(tokens)
    return tmp_path / "folder" / "tokens"


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_what_is_written_is_read(path, suffix):
    data = BinIdx(str(path) + suffix)
    assert [list(data[i]) for i in range(len(data))] == DOCUMENTS
    assert data.tokens.dtype == np.uint16


def test_the_index_is_megatrons(path):
    # written out by hand from the format's description
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    expected += struct.pack("<4i", 3, 1, 0, 5) + struct.pack("<4q", 0, 6, 8, 8) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert path.with_suffix(".idx").read_bytes() == expected
    assert path.with_suffix(".bin").read_bytes() == struct.pack("<9H", 5, 6, 0, 0, 65535, 1, 2, 3, 0)


def test_large_vocabularies_take_four_bytes(tmp_path):
    with BinIdxWriter(tmp_path / "large", 65537) as writer:
        writer.add([65536, 0])
    assert list(BinIdx(tmp_path / "large")[0]) == [65536, 0]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), BinIdxWriter(tmp_path / "tokens", 256) as writer:
        writer.add([1])
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_missing_half_is_named(path):
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens\.bin.*needs both"):
        BinIdx(path)


def test_damage_is_found(path):
    index = path.with_suffix(".idx")
    whole = index.read_bytes()
    index.write_bytes(b"x" + whole[1:])
    with pytest.raises(ValueError, match="does not begin with"):
        BinIdx(path)
    index.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        BinIdx(path)
    index.write_bytes(whole)
    path.with_suffix(".bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="too short for its index"):
        BinIdx(path)
