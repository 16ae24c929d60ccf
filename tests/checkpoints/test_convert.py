import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.data import shared
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import TARGETS, convert
from rookery.errors import BadCheckpoint, UnknownName
from rookery.models import load, save_model

MODELS = ["rwkv4-test", "rwkv5-test", "rwkv5-5.1-test", "rwkv5-5.0-test", "rwkv6-test", "rwkv7-test"]
NAMES = {"official": "m.safetensors", "pth": "m.pth", "ggmf": "m.bin", "gguf": "m.gguf", "hf": "m", "fla": "m"}
HOLD = {
    "rwkv4": ("official", "pth", "hf", "ggmf"),
    "rwkv5": ("official", "pth", "hf", "ggmf"),
    "rwkv6": ("official", "pth", "hf", "fla", "ggmf", "gguf"),
    "rwkv7": ("official", "pth", "fla", "ggmf", "gguf"),
    "transformer": ("official", "pth"),
}
PAIRS = [(name, to) for name in [*MODELS, "transformer-test"] for to in HOLD[name.split("-")[0]]]


@pytest.fixture
def source(tmp_path):
    """Saves a tiny model with numbers of its own."""

    def save(name="rwkv7-test", dtype=torch.float32, **overrides):
        path = tmp_path / f"source-{name}.safetensors"
        if name == "rwkv6-test":
            overrides = {"gate_rank": 64} | overrides  # a setting of variant a alone: no tensor shows it
        save_model(tiny(name, dtype=dtype, **overrides), path)
        return path

    return save


def assert_equal(got, expected, exact=True):
    assert got.config == expected.config
    assert list(got) == list(expected)
    for name in expected:
        a, b = got[name].astype(np.float64), expected[name].astype(np.float64)
        if exact:
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


def without_what_only_we_know(path):
    """Removes our own metadata, so that the file is what another program would have written."""
    for sidecar in path.parent.glob(path.name + ".json"):
        sidecar.unlink()
    if path.is_dir():
        from rookery.checkpoints.safetensors import read_safetensors, write_safetensors

        tensors = read_safetensors(path / "model.safetensors").tensors
        copies = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
        write_safetensors(path / "model.safetensors", copies, {"format": "pt"})


@pytest.mark.parametrize("bare", [False, True], ids=["with metadata", "tensors alone"])
@pytest.mark.parametrize(("name", "to"), PAIRS)
def test_there_and_back_is_the_identity(tmp_path, source, name, to, bare):
    path, there, back = source(name), tmp_path / NAMES[to], tmp_path / "back.pth"
    convert(path, there, to=to)
    if bare and name != "transformer-test":
        without_what_only_we_know(there)
    convert(there, back)
    # rwkv.cpp keeps exponentials of decays
    assert_equal(open_checkpoint(back), open_checkpoint(path), exact=to != "ggmf" or name[4] in "67")


@pytest.mark.parametrize(("name", "to"), PAIRS)
def test_every_format_gives_the_same_logits(tmp_path, source, name, to):
    path = source(name)
    convert(path, tmp_path / NAMES[to], to=to)
    tokens = torch.arange(12)[None] * 5 % 64
    with torch.no_grad():
        expected, _ = load(path)(tokens)
        got, _ = load(tmp_path / NAMES[to])(tokens)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_torch_reads_our_pth(tmp_path, source):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        path = source(dtype=dtype)
        convert(path, tmp_path / "m.pth")
        loaded = torch.load(tmp_path / "m.pth", weights_only=True)
        mapped = torch.load(tmp_path / "m.pth", weights_only=True, mmap=True)
        expected = load(path).state_dict()
        assert list(loaded) == list(expected)
        for name, weight in expected.items():
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name], weight), name
            assert torch.equal(mapped[name], weight), name


def test_narrower_types_round_as_numpy_does(tmp_path, source):
    path = source()
    for dtype, suffix in (
        ("float16", ".pth"),
        ("bfloat16", ".safetensors"),
        ("float16", ".bin"),
        ("bfloat16", ".gguf"),
    ):
        convert(path, tmp_path / f"m{suffix}", dtype=dtype)
        got, expected = open_checkpoint(tmp_path / f"m{suffix}"), open_checkpoint(path)
        name = "blocks.1.ffn.key.weight"
        assert got.dtypes[name].name == dtype
        np.testing.assert_array_equal(got[name], expected[name].astype(got.dtypes[name]))


def test_a_number_too_large_for_float16_is_refused_by_name_and_leaves_nothing(tmp_path, source):
    path = source()
    model = load(path)
    with torch.no_grad():
        model.get_parameter("head.weight")[3, 4] = 1e5
    save_model(model, path)
    for destination in ("m.pth", "m.bin", "m.safetensors", "m.gguf", "folder"):
        with pytest.raises(
            ValueError, match=r"'(head|lm_head|output).weight' has numbers up to 100000, and float16 ends"
        ):
            convert(path, tmp_path / destination, dtype="float16")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("destination", ["m.safetensors", "m.pth", "m.bin", "m.gguf", "folder"])
def test_a_full_disk_leaves_what_was_there(tmp_path, source, monkeypatch, destination):
    path = source()
    if destination != "folder":
        (tmp_path / destination).write_bytes(b"before")
    listing = sorted(os.listdir(tmp_path))

    def full(*_args):
        raise OSError(28, "No space left on device")

    for module in ("safetensors", "pth_writer", "ggmf"):
        monkeypatch.setattr(f"rookery.checkpoints.{module}.write_values", full)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(OSError, match="No space left on device"):
        convert(path, tmp_path / destination)
    assert sorted(os.listdir(tmp_path)) == listing
    assert destination == "folder" or (tmp_path / destination).read_bytes() == b"before"


def test_an_interruption_leaves_nothing(tmp_path, source):
    path = source()

    def interrupt(done, total):
        raise KeyboardInterrupt

    for destination in ("m.safetensors", "m.pth", "m.bin", "m.gguf", "folder"):
        with pytest.raises(KeyboardInterrupt):
            convert(path, tmp_path / destination, progress=interrupt)
    assert os.listdir(tmp_path) == [path.name]


def test_unused_tensors_are_kept_where_they_can_be_and_named_where_not(tmp_path, source):
    model = load(source())
    extra = {f"blocks.0.att.v{i}": torch.full((3,), float(i)) for i in range(3)}
    torch.save(model.state_dict() | extra, tmp_path / "a.pth")
    for destination in ("b.pth", "b.safetensors"):
        assert convert(tmp_path / "a.pth", tmp_path / destination).left_out == ()
        again = open_checkpoint(tmp_path / destination)
        assert again.unused == tuple(extra)
        assert float(again.kept["blocks.0.att.v2"].read()[0]) == 2.0
    for destination in ("b.bin", "b.gguf", "folder"):
        assert convert(tmp_path / "a.pth", tmp_path / destination).left_out == tuple(extra)


def test_the_tokenizer_and_the_metadata_go_along(tmp_path):
    model = tiny(vocab_size=256)
    save_model(model, tmp_path / "a.safetensors", metadata={"tokenizer": "bytes", "note": "from the beach"})
    at = tmp_path / "a.safetensors"
    for name in ("b.pth", "b.bin", "b.gguf", "folder", "c.safetensors"):
        convert(at, tmp_path / name)
        at = tmp_path / name
        checkpoint = open_checkpoint(at)
        assert checkpoint.metadata["note"] == "from the beach"
        assert checkpoint.metadata["tokenizer"] == "bytes"
        assert checkpoint.fingerprint() == model.fingerprint()


def test_a_vocabulary_of_ones_own_goes_along(tmp_path):
    from rookery.tokenizers import resolve
    from rookery.tokenizers.trie import TrieTokenizer

    pieces = {i + 1: bytes([i]) for i in range(256)} | {257: b"the ", 258: b"\n\n", 259: "é'\"\\".encode()}
    (tmp_path / "in").mkdir()
    TrieTokenizer.from_pieces(pieces).save(tmp_path / "in" / "vocab.txt")
    save_model(tiny(vocab_size=300), tmp_path / "in" / "model.safetensors", metadata={"tokenizer": "vocab.txt"})
    at, text = tmp_path / "in", "the é'\"\\ end\n\n"
    for name in ("b.gguf", "b.pth", "folder", "b.bin", "b.safetensors"):
        convert(at, tmp_path / name)
        at = tmp_path / name
        checkpoint = open_checkpoint(at)
        tokenizer = resolve(vocab_size=300, path=at, metadata=checkpoint.metadata)
        assert tokenizer.pieces == pieces, name
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_progress_counts_to_the_end(tmp_path, source):
    seen = []
    path = source()
    done = convert(path, tmp_path / "m.pth", progress=lambda *at: seen.append(at))
    assert seen[-1] == (done.nbytes, done.nbytes)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


@pytest.mark.parametrize(
    ("destination", "options", "error", "message"),
    [
        ("m.pth", {"to": "onnx"}, UnknownName, "no target named 'onnx'"),
        ("m.pth", {"dtype": "float8"}, UnknownName, "no dtype named 'float8'"),
        ("m.pth", {"dtype": "q8_0"}, ValueError, "pth files cannot hold q8_0; they can float32, float16, bfloat16"),
        ("m.bin", {"dtype": "bfloat16"}, ValueError, "ggmf files cannot hold bfloat16; they can float32, float16"),
        ("m.pth", {"to": "fla"}, ValueError, "fla is a folder with config.json; give a name without '.pth'"),
        ("source-rwkv7-test.safetensors", {}, ValueError, "is the source itself"),
        ("no/m.pth", {}, FileNotFoundError, "there is no folder"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, source, destination, options, error, message):
    with pytest.raises(error, match=message):
        convert(source(), tmp_path / destination, **options)


def test_families_are_refused_where_a_format_has_no_place_for_them(tmp_path, source):
    with pytest.raises(ValueError, match="rwkv5 cannot be written as gguf; it can as official, pth, hf, ggmf"):
        convert(source("rwkv5-test"), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="x060b cannot be written as ggmf"):
        convert(source("rwkv6-b-test"), tmp_path / "m.bin")


def test_a_full_folder_is_not_written_over(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; give a new name or remove it first"):
        convert(source(), tmp_path / "out")


def test_what_only_we_know_is_said(tmp_path, source):
    done = convert(source("rwkv6-c-test"), tmp_path / "m.pth")
    assert "only rookery will know of variant='x060c'" in done.remarks[0]
    assert open_checkpoint(tmp_path / "m.pth").config.variant == "x060c"


def test_a_damaged_sidecar_is_refused(tmp_path, source):
    convert(source(), tmp_path / "m.pth")
    (tmp_path / "m.pth.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"m.pth.json', which describes the model, is not JSON; remove it"):
        open_checkpoint(tmp_path / "m.pth")


def test_converting_needs_no_torch(tmp_path, source):
    code = (
        "import sys; from rookery.cli.main import main\n"
        "for to in sys.argv[2:]: assert main(['convert', sys.argv[1], to]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    targets = [str(tmp_path / name) for name in NAMES.values()]
    done = subprocess.run(
        [sys.executable, "-c", code, str(source()), *dict.fromkeys(targets)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pth" in done.stderr


def test_every_target_is_written_by_some_test():
    assert set(NAMES) == set(TARGETS)


@pytest.mark.data
@pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "7v0-834K"])
def test_files_of_rwkv_cpp_come_back_as_they_were(tmp_path, name):
    from rookery.checkpoints.ggmf import read_ggmf

    path = shared(f"models/rwkv_cpp/tiny-rwkv-{name}-FP16.bin")
    convert(path, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "m.bin")
    theirs, ours = read_ggmf(path).tensors, read_ggmf(tmp_path / "m.bin").tensors
    assert sorted(theirs) == sorted(ours)
    for key, tensor in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        exact = "time_decay" not in key
        np.testing.assert_allclose(ours[key].read(), tensor.read(), rtol=0 if exact else 1e-5, err_msg=key)


def test_a_sidecar_of_another_file_is_not_believed(tmp_path, source, caplog):
    convert(source(), tmp_path / "m.pth")
    other = tiny("rwkv4-test")
    torch.save(other.state_dict(), tmp_path / "m.pth")
    checkpoint = open_checkpoint(tmp_path / "m.pth")
    assert (checkpoint.family.name, checkpoint.fingerprint()) == ("rwkv4", other.fingerprint())
    assert "m.pth.json describes another file than" in caplog.text


@pytest.mark.parametrize("to", ["pth", "hf", "ggmf"])
def test_weights_divided_for_float16_are_whole_where_nobody_would_know(tmp_path, to):
    from rookery.nn.rwkv import rescale

    model = tiny("rwkv4-test", num_hidden_layers=5)
    whole = {name: weight.clone() for name, weight in model.state_dict().items()}
    rescale(model, 2)
    save_model(model, tmp_path / "divided.safetensors")
    convert(tmp_path / "divided.safetensors", tmp_path / NAMES[to], to=to)
    without_what_only_we_know(tmp_path / NAMES[to])
    again = open_checkpoint(tmp_path / NAMES[to])
    assert again.config.rescale_every == 0
    name = "blocks.4.ffn.value.weight"
    assert not torch.equal(model.state_dict()[name], whole[name])
    np.testing.assert_array_equal(again[name], whole[name])
