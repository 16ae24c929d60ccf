"""State files: what comes back is what was written, and anything else is refused."""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import rookery
from rookery.checkpoints.state_file import fingerprint, read_state, write_state
from rookery.errors import BadState

SAVER = str(Path(__file__).with_name("kill_while_saving.py"))
ENVIRONMENT = {"PYTHONPATH": str(Path(rookery.__file__).parents[1])}
ARRAYS = {
    "layers.0.wkv": np.arange(12, dtype=np.float32).reshape(1, 3, 4),
    "layers.0.att_shift": np.array([[1.5, -2]], dtype=ml_dtypes.bfloat16),
    "tokens_seen": np.array([7], dtype=np.int64),
}


@pytest.fixture
def path(tmp_path):
    write_state(tmp_path / "story.state", ARRAYS, model="m")
    return tmp_path / "story.state"


def test_a_state_file_gives_back_what_was_written(path):
    back = read_state(path, model="m")
    assert back.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path):
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_state(tmp_path / "t.state", {"a": turned}, model="m")
    np.testing.assert_array_equal(read_state(tmp_path / "t.state", model="m")["a"], turned)


def test_the_state_of_another_model_is_refused(path):
    with pytest.raises(BadState, match=r"is the state of another model \(fingerprint m, this model has other\)"):
        read_state(path, model="other")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadState, match=r"there is no state file '.*none\.state'"):
        read_state(tmp_path / "none.state", model="m")


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadState, match=r"is no state file of this library \(format None\)"):
        read_state(tmp_path / "weights.safetensors", model="m")


def test_every_damaged_byte_of_the_tensors_is_noticed(path):
    whole = path.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    for at in range(first, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadState, match="is damaged"):
            read_state(path, model="m")


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_a_file_cut_short_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadState, match="damaged or no state file"):
        read_state(path, model="m")


def test_a_renamed_tensor_is_noticed(path):
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"att_shift", b"ffn_shift"))
    with pytest.raises(BadState, match="contents do not match its checksum"):
        read_state(path, model="m")


def test_text_is_no_state_file(tmp_path):
    (tmp_path / "notes").write_text(json.dumps({"hello": "there"}) * 9)
    with pytest.raises(BadState, match="damaged or no state file"):
        read_state(tmp_path / "notes", model="m")


@dataclass(frozen=True)
class Config:
    width: int = 4
    eps: float = 1e-5


def named(family="f", config=Config(), embedding=None, norm=None):
    grid = np.linspace(-1, 1, 80, dtype=np.float32).reshape(20, 4)
    return fingerprint(family, config, grid if embedding is None else embedding, np.ones(4) if norm is None else norm)


def test_a_fingerprint_is_the_same_in_every_format_that_keeps_the_weights():
    grid = np.linspace(-1, 1, 80, dtype=np.float32).reshape(20, 4)
    stored = grid.astype(ml_dtypes.bfloat16)
    assert named(embedding=stored) == named(embedding=stored.astype(np.float32)) == named(embedding=grid)
    assert named(embedding=grid[:16]) == named(embedding=grid)
    assert named(config=Config(eps=1e-6)) == named()  # formats round such numbers, or lack them


def test_a_fingerprint_tells_models_apart():
    grid = np.linspace(-1, 1, 80, dtype=np.float32).reshape(20, 4)
    others = [
        named("g"),
        named(config=Config(width=5)),
        named(embedding=grid + 0.1),
        named(norm=np.array([1, 1, 1, 0.9])),
    ]
    assert len({named(), *others}) == 5


def kills(folder, times):
    """Kills a process that saves all the time, `times` times, and checks what each leaves."""
    folder.mkdir(exist_ok=True)
    path, draw = folder / "story.state", random.Random(1)
    values = set()
    for _ in range(times):
        saving = subprocess.Popen([sys.executable, SAVER, str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
        saving.stdout.readline()
        time.sleep(draw.uniform(0, 0.15))
        saving.kill()
        saving.communicate()
        if path.exists():
            (wkv,) = read_state(path, model="a model").values()
            assert len(np.unique(wkv)) == 1
            values.add(float(wkv[0, 0, 0, 0]))
        for left in folder.iterdir():
            if left != path:
                assert left.name.endswith(".part") or left.name.startswith(".tmp")  # safetensors', within a part
                left.unlink()
    assert values


def test_a_file_is_whole_or_absent_when_its_writer_is_killed(tmp_path):
    kills(tmp_path, 5)


@pytest.mark.slow
def test_a_file_is_whole_or_absent_a_thousand_times(tmp_path):
    kills(tmp_path, 1000)


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_refused_or_changes_nothing(path, seed):
    """Bytes are changed, cut out, put in or repeated, in the header as well as in the tensors."""
    whole, draw = path.read_bytes(), random.Random(seed)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        at, count = draw.randrange(len(data)), draw.choice([1, 1, 1, 2, 8])
        how = draw.choice(["flip", "flip", "random", "cut", "insert", "end"])
        if how == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif how == "random":
            data[at : at + count] = draw.randbytes(count)
        elif how == "cut":
            del data[at : at + count]
        elif how == "insert":
            data[at:at] = draw.randbytes(count)
        else:
            del data[at:]
        path.write_bytes(data)
        try:
            back = read_state(path, model="m")
        except BadState:
            refused += 1
            continue
        assert back.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (back[name].dtype, back[name].tobytes()) == (array.dtype, array.tobytes())
    assert refused > 100
