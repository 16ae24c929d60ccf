"""GGUF against the `gguf` package: files as llama.cpp's converter writes them, and ours as the package reads them."""

import gguf
import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.checkpoints.gguf import read_gguf
from rookery.errors import BadCheckpoint
from rookery.models import save_model

WIDE = {
    "rwkv7": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2, "gate_rank": 32},
    "rwkv6": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 8, "gate_rank": 64},
}
"""Rows of a multiple of 256, which the K-quants need."""
T = gguf.GGMLQuantizationType


def model_of(family, dtype=torch.float32, **overrides):
    return tiny(f"{family}-test", dtype=dtype, **(WIDE[family] | overrides))


def weights(model):
    return {name: weight.detach().float().numpy() for name, weight in model.state_dict().items()}


def as_llama_cpp(model, path, kind=T.F32, rescale=0, change=None, architecture=None):
    """What convert_hf_to_gguf.py makes of a model, written from the format's description."""
    family, config, own = model.family, model.config, weights(model)
    writer = gguf.GGUFWriter(path, architecture or family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_wkv_head_size(config.head_dim)
    if family == "rwkv6":
        writer.add_rescale_every_n_layers(rescale)
    tensors = {
        "token_embd": own["emb.weight"],
        "token_embd_norm": own["blocks.0.ln0.weight"],
        "token_embd_norm.bias": own["blocks.0.ln0.bias"],
        "output_norm": own["ln_out.weight"],
        "output_norm.bias": own["ln_out.bias"],
        "output": own["head.weight"],
    }
    for i in range(config.num_hidden_layers):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in own.items() if name.startswith(f"blocks.{i}.")}
        named = block_7(block) if family == "rwkv7" else block_6(block, 2.0 ** (i // rescale) if rescale else 1.0)
        tensors |= {f"blk.{i}.{name}": w for name, w in named.items()}
    if family == "rwkv7":
        tensors |= {f"blk.0.time_mix_v{i}": tensors[f"blk.0.time_mix_a{i}"] for i in range(3)}
    for name, weight in (change or dict)(tensors).items():
        full = name if name.endswith(".bias") else name + ".weight"
        if weight.ndim == 2 and weight.shape[-1] % 256 == 0 and "time_mix_r_k" not in name:
            packed = gguf.quants.quantize(np.ascontiguousarray(weight, np.float32), kind)
            writer.add_tensor(full, packed, raw_dtype=kind)
        else:
            writer.add_tensor(full, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def common(b):
    names = {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}
    tensors = {new: b[f"{old}.weight"] for new, old in names.items()}
    tensors |= {f"{new}.bias": b[f"{old}.bias"] for new, old in names.items()}
    tensors |= {f"time_mix_{n}": b[f"att.{n}.weight"] for n in ("receptance", "key", "value", "output")}
    return tensors | {f"channel_mix_{n}": b[f"ffn.{n}.weight"] for n in ("key", "value")}


def block_7(b):
    tensors = common(b)
    tensors["time_mix_lerp_fused"] = np.stack([b[f"att.x_{c}"] for c in "rwkvag"])
    tensors |= {f"time_mix_{c}0": b[f"att.{c}0"].reshape(-1) for c in "wav" if f"att.{c}0" in b}
    tensors |= {f"time_mix_{c}{i}": b[f"att.{c}{i}"].T for c in "wavg" for i in "12" if f"att.{c}1" in b}
    tensors |= {f"time_mix_{c}": b[f"att.{c}"].reshape(-1) for c in ("k_k", "k_a", "r_k")}
    return tensors | {"channel_mix_lerp_k": b["ffn.x_k"].reshape(-1)}


def block_6(b, divisor):
    tensors = common(b)
    tensors["time_mix_output"] = tensors["time_mix_output"] / divisor
    tensors["channel_mix_value"] = tensors["channel_mix_value"] / divisor
    tensors |= {"time_mix_gate": b["att.gate.weight"], "channel_mix_receptance": b["ffn.receptance.weight"]}
    tensors["time_mix_lerp_x"] = b["att.time_maa_x"].reshape(-1)
    tensors["time_mix_lerp_fused"] = np.stack([b[f"att.time_maa_{c}"] for c in "wkvrg"])
    tensors |= {"time_mix_w1": b["att.time_maa_w1"].T, "time_mix_w2": b["att.time_maa_w2"].transpose(0, 2, 1)}
    tensors |= {"time_mix_first": b["att.time_faaaa"], "time_mix_decay": b["att.time_decay"].reshape(-1)}
    tensors |= {f"time_mix_decay_{c}": b[f"att.time_decay_{c}"].T for c in ("w1", "w2")}
    return tensors | {f"channel_mix_lerp_{c}": b[f"ffn.time_maa_{c}"].reshape(-1) for c in "kr"}


@pytest.mark.parametrize(("family", "rescale"), [("rwkv7", 0), ("rwkv6", 0), ("rwkv6", 3)])
def test_files_of_the_converter_are_read(tmp_path, family, rescale):
    model = model_of(family)
    checkpoint = open_checkpoint(as_llama_cpp(model, tmp_path / "m.gguf", rescale=rescale))
    assert (checkpoint.format, checkpoint.layout, checkpoint.config) == ("gguf", "gguf", model.config)
    assert checkpoint.unused == (("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2") if family == "rwkv7" else ())
    for name, weight in weights(model).items():
        np.testing.assert_array_equal(checkpoint[name], weight, err_msg=name)


def test_separate_mixes_of_the_first_rwkv6_files_are_read(tmp_path):
    model = model_of("rwkv6")

    def apart(tensors):
        stacks = {name: t for name, t in tensors.items() if name.endswith("time_mix_lerp_fused")}
        own = {name.replace("fused", c): t[i].reshape(-1) for name, t in stacks.items() for i, c in enumerate("wkvrg")}
        return {name: t for name, t in tensors.items() if name not in stacks} | own

    checkpoint = open_checkpoint(as_llama_cpp(model, tmp_path / "m.gguf", change=apart))
    for name, weight in weights(model).items():
        np.testing.assert_array_equal(checkpoint[name], weight, err_msg=name)


@pytest.mark.parametrize("kind", [T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1], ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_package_reads_it(tmp_path, kind):
    path = as_llama_cpp(model_of("rwkv7"), tmp_path / "m.gguf", kind)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.time_mix_key.weight"]
    checkpoint = open_checkpoint(path)
    expected = gguf.quants.dequantize(theirs.data, kind)
    np.testing.assert_array_equal(checkpoint["blocks.1.att.key.weight"].astype(np.float32), expected)
    if kind.name.startswith("Q"):
        assert checkpoint.tensors["blocks.1.att.key.weight"].encoding == kind.name


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_are_read_as_the_package_reads_them(tmp_path, kind):
    """The package cannot make these types: random bytes with sane scales stand in."""
    weights_per_block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(5).integers(0, 256, (256, size), np.uint8)
    half = np.float16(0.01).tobytes()
    blocks[:, (slice(0, 2) if kind == T.Q4_K else slice(-2, None))] = np.frombuffer(half, np.uint8)
    blocks[:, 2:4] = np.frombuffer(half, np.uint8) if kind == T.Q4_K else blocks[:, 2:4]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_wkv_head_size(64)
    writer.add_tensor("x.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_gguf(tmp_path / "m.gguf").tensors["x.weight"]
    assert (stored.shape, stored.encoding) == ((256, weights_per_block), kind.name)
    np.testing.assert_array_equal(stored.read(), gguf.quants.dequantize(blocks, kind))
    assert np.isfinite(stored.read()).all()
    assert (stored.packed is not None) == (kind == T.Q6_K)


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0"])
def test_ours_has_the_tensors_of_the_converter(tmp_path, family, dtype):
    model = model_of(family)
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "ours.gguf", dtype=dtype)
    kind = {"float32": T.F32, "float16": T.F16, "bfloat16": T.BF16, "q8_0": T.Q8_0, "q4_0": T.Q4_0}[dtype]
    theirs = {t.name: t for t in gguf.GGUFReader(as_llama_cpp(model, tmp_path / "theirs.gguf", kind)).tensors}
    ours = {t.name: t for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert [n for n in ours[name].shape if n != 1] == [n for n in tensor.shape if n != 1], name
    matrix = "blk.1.time_mix_value.weight"
    assert ours[matrix].tensor_type == kind
    np.testing.assert_array_equal(ours[matrix].data, theirs[matrix].data)
    # what llama.cpp never takes in less than float32
    small = ("time_mix_w1", "time_mix_w2", "time_mix_first", "time_mix_lerp_fused", "time_mix_decay")
    for name in (f"blk.1.{part}.weight" for part in small):
        assert name not in ours or ours[name].tensor_type == T.F32, name


def test_settings_and_vocabulary_are_what_llama_cpp_asks_for(tmp_path):
    model = tiny("rwkv7-test", vocab_size=65536)
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.to")}
    config = model.config
    expected = {
        "general.architecture": "rwkv7",
        "rwkv7.embedding_length": config.hidden_size,
        "rwkv7.block_count": config.num_hidden_layers,
        "rwkv7.feed_forward_length": config.intermediate_size,
        "rwkv7.attention.head_count": 0,
        "rwkv7.wkv.head_size": config.head_dim,
        "rwkv7.attention.decay_lora_rank": config.decay_rank,
        "rwkv7.attention.iclr_lora_rank": config.rate_rank,
        "rwkv7.attention.value_residual_mix_lora_rank": config.value_rank,
        "rwkv7.attention.gate_lora_rank": config.gate_rank,
        "rwkv7.token_shift_count": 2,
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.eot_token_id": 261,
        "tokenizer.chat_template": "rwkv-world",
    }
    assert {key: found.get(key) for key in expected} == expected
    tokens = open_checkpoint(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 65536
    assert (tokens[0], tokens[261], tokens[65535]) == (b"<s>", rb"\n\n", b"[PAD65535]")


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_other_architectures_are_named(tmp_path, name):
    path = as_llama_cpp(model_of("rwkv7"), tmp_path / "m.gguf", architecture=name)
    with pytest.raises(
        BadCheckpoint, match=f"m.gguf' is a GGUF file of the architecture '{name}'; rwkv6, rwkv7, arwkv7"
    ):
        open_checkpoint(path)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    def without(tensors):
        return {name: t for name, t in tensors.items() if name != "blk.1.channel_mix_key"}

    path = as_llama_cpp(model_of("rwkv7"), tmp_path / "m.gguf", change=without)
    with pytest.raises(BadCheckpoint, match="1 missing: 'blocks.1.ffn.key.weight'"):
        open_checkpoint(path)


def test_a_type_that_is_not_read_is_named(tmp_path):
    path = as_llama_cpp(model_of("rwkv7"), tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.time_mix_key.weight") + len(b"blk.1.time_mix_key.weight") + 4 + 16
    data[at : at + 4] = (19).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"'blk.1.time_mix_key.weight' of shape .* has type 19, which is not read"):
        open_checkpoint(path)


def test_damage_is_refused_whatever_it_is(tmp_path):
    """Every cut, and bytes changed anywhere in the tables: BadCheckpoint or a model, never another error."""
    model = tiny("rwkv7-test", num_hidden_layers=1)
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(3)
    refused = 0
    for trial in range(300):
        damaged = bytearray(data)
        if trial % 3 == 0:
            damaged = damaged[: int(generator.integers(4, len(data)))]
        else:
            at = int(generator.integers(4, 5000))
            damaged[at : at + int(generator.integers(1, 8))] = generator.bytes(1) * 4
        path.write_bytes(damaged)
        try:
            open_checkpoint(path).fingerprint()
        except BadCheckpoint:
            refused += 1
    assert refused > 100


def test_the_setting_that_gives_the_heads_must_be_there(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("x.weight", np.ones(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadCheckpoint, match=r"the setting 'rwkv7.wkv.head_size' is missing"):
        open_checkpoint(tmp_path / "m.gguf")
