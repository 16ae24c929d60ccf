import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rookery.checkpoints.safetensors import ALIGNMENT, read_safetensors, write_safetensors
from rookery.checkpoints.source import in_memory
from rookery.errors import BadCheckpoint
from rookery.state import to_numpy

TORCH_TYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
]


def lying(tmp_path, header, body=b"\0" * 16, length=None):
    """A file whose header says what it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(shape=(4,), dtype="F32", offsets=(0, 16)):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_files_of_the_safetensors_library_are_read_exactly(tmp_path):
    content = {name: torch.arange(12).reshape(3, 4).to(getattr(torch, name)) for name in TORCH_TYPES}
    content |= {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 5)}
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "ü"})
    source = read_safetensors(tmp_path / "model.safetensors")
    assert source.metadata == {"format": "pt", "note": "ü"}
    assert source.tensors.keys() == content.keys()
    for name, tensor in content.items():
        got = source.tensors[name].read()
        assert got.shape == tuple(tensor.shape)
        assert not got.size or got.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
        assert name not in TORCH_TYPES or got.dtype.name == name
        assert not got.flags.writeable


def test_files_that_we_write_are_read_by_the_safetensors_library(tmp_path):
    content = {
        "b": torch.arange(3).to(torch.bfloat16),
        "f": torch.rand(2, 3),
        "d": torch.rand(2).double(),
        "e": torch.ones(0),
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: to_numpy(t) for name, t in content.items()}, {"note": "ü"})
    back = load_file(path)
    assert back.keys() == content.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in content.items())
    assert read_safetensors(path).metadata == {"note": "ü"}
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 0


def test_transposed_and_lazy_tensors_are_written_by_value(tmp_path):
    array = np.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "m", {"t": array.T, "lazy": in_memory(array.T)}, {})
    for stored in read_safetensors(tmp_path / "m").tensors.values():
        np.testing.assert_array_equal(stored.read(), array.T)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": np.ones(3)}, {})
    before = path.read_bytes()

    def fail():
        raise OSError("disk full")

    broken = in_memory(np.ones(3))
    object.__setattr__(broken, "read", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"w": broken}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_types_that_the_format_has_not_are_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"cannot hold complex64 \(w\); convert it"):
        write_safetensors(tmp_path / "m", {"w": np.ones(3, np.complex64)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is not JSON"),
        (b"{" + b"[" * 100_000, "header is not JSON"),
        (b'{"w": 1' + b"1" * 5000 + b"}", "header is not JSON"),
        (b"\xff\xfe{}", "header is not JSON"),
        (b"[]", "not a table of tensors"),
        ({"__metadata__": {"a": 1}}, "its metadata are not text"),
        ({"__metadata__": "x"}, "its metadata are not text"),
        ({"w": 3}, "tensor 'w' is not described"),
        ({"w": {}}, "tensor 'w' has no valid shape"),
        (entry(shape=(-4,)), "tensor 'w' has no valid shape"),
        (entry(shape=(4.0,)), "tensor 'w' has no valid shape"),
        (entry(shape=(True, 4)), "tensor 'w' has no valid shape"),
        (entry(shape=(1,) * 100), "tensor 'w' has no valid shape"),
        (entry(shape=(10**40,)), "tensor 'w' has no valid shape"),
        (entry(dtype="I4"), "tensor 'w' is of type 'I4'; known are F64, F32"),
        (entry(dtype=None), "tensor 'w' is of type 'None'"),
        (entry(offsets=(0,)), "tensor 'w' has no place in the file"),
        (entry(offsets=(0.0, 16.0)), "tensor 'w' has no place in the file"),
        (entry(offsets=(0, 15)), "tensor 'w' needs 16 bytes at 0 of 16"),
        (entry(offsets=(16, 32)), "tensor 'w' needs 16 bytes at 16 of 16"),
        (entry(offsets=(16, 0)), "tensor 'w' needs 16 bytes at 16 of 16"),
        (entry(offsets=(-16, 0)), "tensor 'w' needs 16 bytes at -16 of 16"),
        (entry(shape=(10**12,), offsets=(0, 4 * 10**12)), "needs 4,000,000,000,000 bytes at 0 of 16"),
        ({"x" * 100_000: 3}, "tensor 'x{100}…' is not described"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    tracemalloc.start()
    with pytest.raises(BadCheckpoint, match=message) as refusal:
        read_safetensors(lying(tmp_path, header))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("length", [2**63, 10**12, 99, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    with pytest.raises(BadCheckpoint, match=f"its header should have {length:,} bytes, the file has 26"):
        read_safetensors(lying(tmp_path, {}, length=length))


def test_an_empty_and_a_very_short_file_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(BadCheckpoint, match="is empty; download or copy it again"):
        read_safetensors(path)
    path.write_bytes(b"\2\0\0")
    with pytest.raises(BadCheckpoint, match="damaged or cut short"):
        read_safetensors(path)


def test_bfloat16_needs_no_torch(tmp_path):
    array = np.arange(4, dtype=ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "m", {"w": array}, {})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "m").tensors["w"].read(), array)
