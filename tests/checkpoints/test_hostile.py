"""Damaged files of every format: whatever bytes change, the answer is a model or BadCheckpoint."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.files import ggmf_weights, tiny, write_ggmf

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.describe import inspect
from rookery.errors import BadCheckpoint
from rookery.models import save_model

FORMATS = ("pth", "safetensors", "ggmf")
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small():
    return tiny(hidden_size=32, num_hidden_layers=2, vocab_size=8, intermediate_size=32)


class Files(dict):
    """Hypothesis prints the arguments of a failing test: these would be a megabyte."""

    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Format -> bytes of a whole file."""
    folder, model = tmp_path_factory.mktemp("valid"), small()
    torch.save(model.state_dict(), folder / "pth")
    save_model(model, folder / "safetensors")
    write_ggmf(folder / "ggmf", ggmf_weights(model))
    # one matrix quantised, so that damage reaches the packed formats too
    weights = ggmf_weights(model)
    weights["blocks.1.ffn.key.weight"] = (8, (32, 32), bytes(range(256)) * 3)
    write_ggmf(folder / "ggmf", weights)
    return Files({name: (folder / name).read_bytes() for name in FORMATS})


def attempt(path, raw):
    """Opens and reads everything; True if it was a model."""
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        inspect(path)
    except BadCheckpoint as refusal:
        message = str(refusal)
    else:
        message = None
    if message is not None:
        assert 10 < len(message) < 2000
        assert "\n" not in message
        return False
    for name in checkpoint:
        assert checkpoint[name].shape == checkpoint.shapes[name]
        assert checkpoint[name].dtype == checkpoint.dtypes[name]
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_the_files_to_be_damaged_are_models(tmp_path, valid, kind):
    assert attempt(tmp_path / "m", valid[kind])


PLACE = st.integers(0, 10**6)
"""A place in a file, taken modulo the number of places."""
EDITS = st.lists(st.tuples(PLACE, st.integers(0, 255)), min_size=1, max_size=8)


def edited(whole, edits, places):
    raw = bytearray(whole)
    for at, value in edits:
        raw[places[at % len(places)]] = value
    return bytes(raw)


@functools.cache
def structure(kind, whole):
    """Where a file says what is in it: the pickle and the directory, the header, the heads of tensors."""
    if kind == "safetensors":
        return range(8 + int.from_bytes(whole[:8], "little"))
    if kind == "ggmf":
        names = [at for at in range(len(whole)) if whole.startswith(b"blocks", at)]
        return [*range(60), *(at + i for at in names for i in range(-28, 24))]
    pickle, directory = whole.index(b"\x80\2"), whole.index(b"PK\1\2")
    return [*range(64), *range(pickle, whole.index(b"PK\3\4", pickle)), *range(directory, len(whole))]


@pytest.mark.parametrize("kind", FORMATS)
@FUZZ
@given(length=PLACE)
def test_a_truncated_file_is_refused(tmp_path, valid, kind, length):
    assert not attempt(tmp_path / "m", valid[kind][: length % len(valid[kind])])


@pytest.mark.parametrize("kind", FORMATS)
@FUZZ
@given(edits=EDITS)
def test_changed_bytes_anywhere_do_no_harm(tmp_path, valid, kind, edits):
    attempt(tmp_path / "m", edited(valid[kind], edits, range(len(valid[kind]))))


@pytest.mark.parametrize("kind", FORMATS)
@FUZZ
@given(edits=EDITS)
def test_changed_bytes_in_the_description_do_no_harm(tmp_path, valid, kind, edits):
    attempt(tmp_path / "m", edited(valid[kind], edits, structure(kind, valid[kind])))


@pytest.mark.parametrize("kind", FORMATS)
@FUZZ
@given(cuts=st.tuples(PLACE, PLACE, PLACE), order=st.permutations(range(4)), count=st.integers(1, 4))
def test_pieces_left_out_or_swapped_do_no_harm(tmp_path, valid, kind, cuts, order, count):
    whole = valid[kind]
    a, b, c = sorted(at % len(whole) for at in cuts)
    pieces = (whole[:a], whole[a:b], whole[b:c], whole[c:])
    attempt(tmp_path / "m", b"".join(pieces[i] for i in order[:count]))


@FUZZ
@given(raw=st.binary(max_size=400))
@example(b"\x80")
@example(b"\0" * 28)
@example(b"PK\3\4")
@example(b"PK\5\6" + b"\0" * 18)
@example(b"\2" + b"\0" * 7 + b"{}")
def test_any_bytes_are_refused(tmp_path, raw):
    assert not attempt(tmp_path / "m", raw)


@FUZZ
@given(
    magic=st.sampled_from([b"PK\3\4", b"fmgg\x65\0\0\0", b"\x40" + b"\0" * 7 + b"{", b"\x80\2"]),
    raw=st.binary(max_size=400),
)
def test_any_bytes_behind_a_magic_number_are_refused(tmp_path, magic, raw):
    assert not attempt(tmp_path / "m", magic + raw)


def test_texts_of_the_oldest_protocol_make_no_noise(tmp_path, valid):
    # found by chance: a changed byte turned an opcode into STRING, whose escapes Python warns of
    text = b"X\n\0\0\0emb.weight"
    raw = valid["pth"].replace(text, b"S'\\g" + b"." * (len(text) - 6) + b"'\n", 1)
    assert len(raw) == len(valid["pth"])
    assert raw != valid["pth"]
    attempt(tmp_path / "m", raw)


def test_numbers_are_read_as_they_are_even_where_they_are_absurd(tmp_path):
    weights = ggmf_weights(small())
    weights["head.weight"] = np.full_like(weights["head.weight"], np.nan)
    write_ggmf(tmp_path / "m", weights)
    assert np.isnan(open_checkpoint(tmp_path / "m")["head.weight"]).all()
