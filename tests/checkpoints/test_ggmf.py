import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from support.data import shared
from support.files import write_ggmf

from rookery.checkpoints.ggmf import PACKED, read_ggmf
from rookery.errors import BadCheckpoint


def blocks(kind, count, seed=0):
    """Random bytes that are valid blocks of a packed type: every scale finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, PACKED[kind].layout.itemsize), dtype=np.uint8)
    halves = 2 if PACKED[kind].has_minimum else 1
    raw[:, : 2 * halves] = rng.normal(size=(count, halves)).astype("<f2").view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_what_ggml_makes_of_them(tmp_path, kind):
    raw, packed = blocks(kind, 15), PACKED[kind]
    path = write_ggmf(tmp_path / "m.bin", {"w": (kind, (3, 160), raw.tobytes())})
    stored = read_ggmf(path).tensors["w"]
    assert (stored.shape, stored.encoding, stored.nbytes) == ((3, 160), packed.name, raw.size)
    want = dequantize(raw.reshape(3, -1), GGMLQuantizationType[packed.name])
    got = stored.read()
    assert got.dtype == stored.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_five_bit_weights_follow_the_description(tmp_path):
    raw = blocks(8, 1)[0].tobytes()
    scale, minimum, high = struct.unpack("<eeI", raw[:8])
    want = np.empty(32, np.float32)
    for j, byte in enumerate(raw[8:]):
        want[j] = (byte & 15 | (high >> j & 1) << 4) * scale + minimum
        want[j + 16] = (byte >> 4 | (high >> j + 16 & 1) << 4) * scale + minimum
    got = read_ggmf(write_ggmf(tmp_path / "m.bin", {"w": (8, (32,), raw)})).tensors["w"].read()
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("version", [100, 101])
def test_plain_tensors_are_mapped_at_any_offset(tmp_path, version):
    content = {
        "blocks.0.ü": np.arange(6, dtype=np.float32).reshape(2, 3),
        "odd": np.arange(4, dtype=np.float16),
        "after": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    }
    source = read_ggmf(write_ggmf(tmp_path / "m.bin", content, version))
    assert (source.format, source.metadata) == ("ggmf", {"version": str(version)})
    assert list(source.tensors) == list(content)
    for name, array in content.items():
        got = source.tensors[name].read()
        assert got.dtype == array.dtype
        assert not got.flags.writeable
        np.testing.assert_array_equal(got, array)


def test_damaged_scales_give_numbers_and_no_warning(tmp_path):
    raw = np.full(PACKED[3].layout.itemsize, 0xFF, np.uint8)  # both halves are NaN
    assert np.isnan(
        read_ggmf(write_ggmf(tmp_path / "m.bin", {"w": (3, (32,), raw.tobytes())})).tensors["w"].read()
    ).all()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((0, (4,), b"\0" * 12), "tensor 'w' at byte .* needs 16 bytes, 12 are left"),
        ((0, (2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1), b""), "tensor 'w' at byte .* needs 85,070,591"),
        ((0, (-1, 4), b"\0" * 16), r"tensor 'w' has shape \[-1, 4\]"),
        ((4, (32,), b"\0" * 64), r"has type 4; known are F32, F16 and, for rows of a multiple of 32, Q4_0, Q4_1"),
        ((99, (32,), b"\0" * 64), "has type 99"),
        ((2, (33,), b"\0" * 64), r"of shape \[33\] has type 2"),
        ((2, (64, 16), b"\0" * 576), r"of shape \[64, 16\] has type 2"),
        ((0, (), b"\0" * 4), "has 0 dimensions"),
        ((0, (1,) * 5, b"\0" * 4), "has 5 dimensions"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path, tensor, message):
    with pytest.raises(BadCheckpoint, match=message):
        read_ggmf(write_ggmf(tmp_path / "m.bin", {"w": tensor}))


def test_other_damage_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(b"fmgg\x65\0\0\0")
    with pytest.raises(BadCheckpoint, match="starts with 24 bytes, this has 8"):
        read_ggmf(path)
    with pytest.raises(BadCheckpoint, match="ggmf version 102; 100 and 101 are read"):
        read_ggmf(write_ggmf(path, {}, version=102))
    header = write_ggmf(path, {}).read_bytes()
    for length, message in ((-1, "a tensor's name at byte 40 needs -1 bytes"), (10**9, "needs 1,000,000,000 bytes")):
        path.write_bytes(header + struct.pack("<4i", 1, length, 0, 4) + b"w" + b"\0" * 16)
        with pytest.raises(BadCheckpoint, match=message):
            read_ggmf(path)
    path.write_bytes(header + struct.pack("<4i", 1, 1, 0, 1) + b"\xff" + b"\0" * 4)
    with pytest.raises(BadCheckpoint, match="is not UTF-8"):
        read_ggmf(path)
    twice = header + 2 * (struct.pack("<4i", 1, 1, 0, 1) + b"w" + b"\0" * 4)
    path.write_bytes(twice)
    with pytest.raises(BadCheckpoint, match="tensor 'w' is there twice"):
        read_ggmf(path)
    path.write_bytes(twice[:-1])
    with pytest.raises(BadCheckpoint, match="damaged or cut short"):
        read_ggmf(path)


@pytest.mark.data
@pytest.mark.parametrize("family", ["4v0-660K", "5v2-730K", "7v0-834K"])
def test_quantised_files_are_close_to_the_exact_ones(family):
    folder = "models/rwkv_cpp/tiny-rwkv-"
    exact = read_ggmf(shared(f"{folder}{family}-FP32.bin")).tensors
    for kind, error in (("FP16", 1e-3), ("Q5_0", 0.08), ("Q5_1", 0.08)):
        other = read_ggmf(shared(f"{folder}{family}-{kind}.bin")).tensors
        assert list(other) == list(exact)
        for name, tensor in exact.items():
            want, got = tensor.read(), other[name].read().astype(np.float32)
            # the v4 model has an FFN of 1e-7, which no float16 scale can tell from zero
            assert np.abs(got - want).max() <= error * np.abs(want).max() + 1e-6, f"{kind} {name}"
