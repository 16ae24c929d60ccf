import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.data import shared
from support.files import assert_same_weights, ggmf_weights, tiny, write_ggmf

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.layout import to_foreign
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.checkpoints.source import in_memory
from rookery.errors import BadCheckpoint
from rookery.families.rwkv7 import FAMILY
from rookery.models import save_model
from rookery.registry import families
from rookery.state import from_numpy, to_numpy


def arrays(model):
    return {name: to_numpy(weight) for name, weight in model.state_dict().items()}


def as_pth(model, path):
    torch.save(model.state_dict(), path)


def as_ggmf(model, path):
    write_ggmf(path, ggmf_weights(model))


def as_fla(model, path):
    foreign = to_foreign(FAMILY.layouts["fla"], {name: in_memory(array) for name, array in arrays(model).items()})
    write_safetensors(path, foreign, {"format": "pt"})


def as_plain_safetensors(model, path):
    write_safetensors(path, arrays(model), {})


WRITERS = {
    "pth": (as_pth, "pth", "official"),
    "safetensors": (as_plain_safetensors, "safetensors", "official"),
    "ours": (save_model, "safetensors", "official"),
    "fla": (as_fla, "safetensors", "fla"),
    "ggmf": (as_ggmf, "ggmf", "ggmf"),
}


def assert_is(checkpoint, model):
    assert checkpoint.family.name == model.family
    assert checkpoint.config == model.config
    assert checkpoint.shapes == checkpoint.family.tensor_shapes(model.config)
    assert list(checkpoint) == list(checkpoint.shapes)
    assert len(checkpoint) == len(checkpoint.shapes)
    for name, weight in model.state_dict().items():
        if name in checkpoint:
            assert checkpoint[name].shape == tuple(weight.shape), name
            assert torch.equal(from_numpy(checkpoint[name]), weight), name
            assert checkpoint.dtypes[name] == to_numpy(weight).dtype


@pytest.mark.parametrize("writer", WRITERS)
def test_one_model_is_the_same_in_every_format(tmp_path, writer):
    write, file_format, layout = WRITERS[writer]
    model = tiny()
    write(model, tmp_path / "any.name")
    checkpoint = open_checkpoint(tmp_path / "any.name")
    assert (checkpoint.format, checkpoint.layout, checkpoint.unused) == (file_format, layout, ())
    assert_is(checkpoint, model)
    assert checkpoint.fingerprint() == checkpoint.computed_fingerprint() == model.fingerprint()


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_is_recognised_from_its_own_file(tmp_path, family, dtype):
    model = tiny(f"{family}-test", dtype=dtype)
    save_model(model, tmp_path / "model.safetensors", metadata={"tokenizer": "world"})
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert_is(checkpoint, model)
    assert checkpoint.metadata["tokenizer"] == "world"
    assert checkpoint.dtype == to_numpy(torch.ones(1, dtype=dtype)).dtype


def test_settings_that_no_tensor_shows_come_from_our_metadata(tmp_path):
    model = tiny(num_hidden_layers=1, group_norm_eps=1e-5, init="v7-2024", value_rank=7)
    save_model(model, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config == model.config


def test_unused_tensors_are_listed_and_left_out(tmp_path):
    model = tiny()
    extra = {f"blocks.0.att.v{i}": torch.ones(1) for i in range(3)}
    torch.save(model.state_dict() | extra, tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.unused == tuple(extra)
    assert_is(checkpoint, model)


def test_vectors_with_and_without_ones_in_their_shape_are_the_same(tmp_path):
    model = tiny()
    squeezed = {name: weight.squeeze() for name, weight in model.state_dict().items()}
    torch.save(squeezed, tmp_path / "model.pth")
    assert_is(open_checkpoint(tmp_path / "model.pth"), model)


def test_a_stated_fingerprint_holds(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "a")
    source = read_safetensors(tmp_path / "a")
    write_safetensors(tmp_path / "b", source.tensors, {**source.metadata, "fingerprint": "feed"})
    checkpoint = open_checkpoint(tmp_path / "b")
    assert checkpoint.fingerprint() == "feed"
    assert checkpoint.computed_fingerprint() == model.fingerprint()


@pytest.mark.data
def test_llama2c_files_are_read():
    checkpoint = open_checkpoint(shared("models/babyllama/model5000.bin"))
    assert (checkpoint.format, checkpoint.family.name, checkpoint.config.head_dim) == ("llama2c", "transformer", 16)


def test_opening_a_file_needs_no_torch(tmp_path):
    save_model(tiny(), tmp_path / "a")
    as_pth(tiny(), tmp_path / "b")
    as_ggmf(tiny(), tmp_path / "c")
    code = (
        "import sys; from rookery.checkpoints.describe import inspect\n"
        "for path in sys.argv[1:]: print(inspect(path)['fingerprint'])\n"
        "assert not {'torch', 'gguf', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    paths = [str(tmp_path / name) for name in "abc"]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {tiny().fingerprint()}


# what is refused


def saved(tmp_path, weights, metadata=None):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: np.asarray(array) for name, array in weights.items()}, metadata or {})
    return path


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path):
    weights = arrays(tiny())
    del weights["blocks.2.ffn.x_k"], weights["blocks.1.att.v2"]
    weights["blocks.1.att.surprise"] = np.ones(3, np.float32)
    path = saved(tmp_path, weights)
    with pytest.raises(BadCheckpoint) as refusal:
        open_checkpoint(path)
    assert str(refusal.value) == (
        f"{str(path)!r}: no whole rwkv7 checkpoint. Tensors 2 missing: 'blocks.1.att.v2', 'blocks.2.ffn.x_k'; "
        "1 unknown: 'blocks.1.att.surprise'"
    )


def test_a_tensor_needed_to_know_the_sizes_is_missed_by_name(tmp_path):
    weights = arrays(tiny())
    del weights["blocks.0.att.w1"]
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors': .*'blocks.0.att.w1' is missing"):
        open_checkpoint(saved(tmp_path, weights))


def test_mis_shaped_tensors_are_refused_by_name(tmp_path):
    weights = arrays(tiny())
    weights["blocks.1.att.output.weight"] = np.ones((32, 16), np.float32)
    with pytest.raises(BadCheckpoint, match=r"'blocks.1.att.output.weight' has shape \[32, 16\].* ask for \[32, 32\]"):
        open_checkpoint(saved(tmp_path, weights))


def test_a_transposed_matrix_is_not_taken_for_a_squeezed_one(tmp_path):
    weights = arrays(tiny())
    weights["blocks.1.ffn.key.weight"] = weights["blocks.1.ffn.key.weight"].T.copy()
    with pytest.raises(BadCheckpoint, match=r"'blocks.1.ffn.key.weight' has shape \[32, 96\]"):
        open_checkpoint(saved(tmp_path, weights))


def test_weights_that_are_no_floats_are_refused(tmp_path):
    weights = arrays(tiny())
    weights["head.weight"] = weights["head.weight"].astype(np.int8)
    with pytest.raises(BadCheckpoint, match="'head.weight' holds int8 numbers, weights are floats"):
        open_checkpoint(saved(tmp_path, weights))


def test_names_that_claim_a_thousand_million_layers_are_refused_at_once(tmp_path):
    for name in (
        "blocks.999999999.att.x_r",
        f"blocks.{'9' * 4000}.x",
        f"blocks.{'9' * 5000}.x",
        "blocks.x.y",
        "blocks.",
    ):
        path = saved(tmp_path, arrays(tiny()) | {name: np.ones(1, np.float32)})
        with pytest.raises(BadCheckpoint):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rookery": "model-9"}, "written by a newer rookery"),
        ({"family": "rwkv4"}, "the metadata say 'rwkv4', its tensors are those of rwkv7"),
        ({"config": "{"}, "the config in its metadata cannot be read"),
        ({"config": "[]"}, "the config in its metadata cannot be read"),
        ({"config": '{"surprise": 1}'}, "the config in its metadata cannot be read"),
        ({"config": '{"head_dim": 0}'}, "the config in its metadata cannot be read"),
        ({"config": '{"hidden_size": true}'}, "the config in its metadata cannot be read"),
        ({"config": '{"num_hidden_layers": 1000000000}'}, r"1000000000 layers, but there are \d+ tensors"),
        ({"config": '{"num_hidden_layers": "3"}'}, "model.safetensors"),
        ({"config": '{"hidden_size": 1000000000000}'}, "model.safetensors"),
        ({"format": "rookery-state-1"}, "this is the state of a model, not a model"),
    ],
)
def test_metadata_that_lie_are_refused(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_model(tiny(), path)
    source = read_safetensors(path)
    write_safetensors(path, source.tensors, {**source.metadata, **change})
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(path)


def test_tensors_of_no_family_are_refused(tmp_path):
    path = saved(tmp_path, {"x.weight": np.ones(2)})
    with pytest.raises(BadCheckpoint, match=r"model.safetensors': no registered family has these tensors \(x.weight"):
        open_checkpoint(path)
    write_ggmf(path, {"x.weight": np.ones(2, np.float32)})
    with pytest.raises(BadCheckpoint, match=r"no registered family reads ggmf files with these tensors \('x.weight'"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no model file of a known format"),
        (b"GGUF\3\0\0\0" + b"\0" * 40, "is a GGUF file"),
        (b"Once upon a time, there was a model.", "no model file of a known format .*Once upon"),
        (b"\0" * 1000, "no model file of a known format"),
        (b"PK\3\4" + b"x" * 100, "is not a whole zip file"),
        (b"{", "no model file of a known format"),
        (b"fmgg", "cut short"),
        (b"\x80\2}.", "is a bare pickle, as torch wrote before version 1.6"),
        (bytes(range(200, 256)) * 9, "no model file of a known format"),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path, content, message):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(path)


def test_files_of_old_torch_versions_are_refused_with_the_remedy(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match=r"before version 1.6.*torch.save\(torch.load"):
        open_checkpoint(tmp_path / "old.pth")


def test_paths_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"there is no file '.*nothing'$"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(BadCheckpoint, match="neither a file nor a folder"):
        open_checkpoint("/dev/null")


# folders


def sharded(folder, weights, prefix="model"):
    """Two shards and their index, as Hugging Face models have them."""
    names = list(weights)
    parts = {f"{prefix}-00001-of-00002.safetensors": names[::2], f"{prefix}-00002-of-00002.safetensors": names[1::2]}
    for shard, own in parts.items():
        write_safetensors(folder / shard, {name: weights[name] for name in own}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_folder_is_one_model(tmp_path):
    model = tiny()
    sharded(tmp_path, arrays(model))
    assert_is(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "model.pth", "pytorch_model.bin"])
def test_a_folder_with_one_file_is_that_model(tmp_path, name):
    model = tiny()
    (as_plain_safetensors if name.endswith("safetensors") else as_pth)(model, tmp_path / name)
    (tmp_path / "README.md").write_text("a model")
    assert_is(open_checkpoint(tmp_path), model)


def test_a_folder_without_a_model_or_with_several_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"found: none\. Name the file itself"):
        open_checkpoint(tmp_path)
    as_pth(tiny(), tmp_path / "a.pth")
    as_pth(tiny(), tmp_path / "b.pth")
    with pytest.raises(BadCheckpoint, match=r"found: a.pth, b.pth\. Name the file itself"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "", "a\\b", "nothing.safetensors"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, shard):
    folder = tmp_path / "folder"
    folder.mkdir()
    as_plain_safetensors(tiny(), tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"emb.weight": shard}}))
    with pytest.raises(BadCheckpoint, match="the index names the file .* which is not in the folder"):
        open_checkpoint(folder)


def test_an_index_that_lies_is_refused(tmp_path):
    index = sharded(tmp_path, arrays(tiny()))
    path = tmp_path / "model.safetensors.index.json"
    index["weight_map"]["emb.weight"] = index["weight_map"]["blocks.0.ln1.bias"]
    other = next(name for name, shard in index["weight_map"].items() if shard != index["weight_map"]["emb.weight"])
    index["weight_map"]["emb.weight"] = index["weight_map"][other]
    path.write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="the index puts 'emb.weight' into .* where it is not"):
        open_checkpoint(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "not a JSON table"), ('{"weight_map": {"a": 1}}', "weight_map")):
        path.write_text(text)
        with pytest.raises(BadCheckpoint, match=message):
            open_checkpoint(tmp_path)


def transformer_folder(tmp_path, config, **overrides):
    model = tiny("transformer-test", **overrides)
    as_plain_safetensors(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model


def test_a_config_file_tells_what_tensors_do_not(tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"rope_theta": 500000, "rms_norm_eps": 1e-6}
    model = transformer_folder(tmp_path, config, rope_theta=5e5, rms_norm_eps=1e-6)
    assert open_checkpoint(tmp_path).config == model.config


def test_a_config_file_that_contradicts_the_tensors_in_one_place_is_believed_in_the_others(tmp_path):
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32000}
    model = transformer_folder(tmp_path, config)
    assert open_checkpoint(tmp_path).config == model.config


def test_a_config_file_cannot_do_harm(tmp_path):
    model = tiny()
    as_plain_safetensors(model, tmp_path / "model.safetensors")
    for config in ({"num_hidden_layers": 10**9}, {"head_dim": 0, "hidden_size": -1}, {"vocab_size": "x"}, {"init": 3}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(tmp_path).config == model.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="is not JSON"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_writes_back_what_it_reads(tmp_path):
    model = tiny()
    as_ggmf(model, tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    write_safetensors(tmp_path / "b", checkpoint.tensors, {})
    back = open_checkpoint(tmp_path / "b")
    assert_is(back, model)
    model.load_state_dict({name: from_numpy(back[name]) for name in back})
    assert_same_weights(model, tiny().state_dict())
