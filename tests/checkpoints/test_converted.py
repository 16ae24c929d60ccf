"""Files of converted transformers: Hugging Face folders with and without what only we know, GGUF, tensors that idle."""

import json

import gguf
import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.errors import BadCheckpoint
from rookery.models import load, save_model

MODELS = [
    ("arwkv-test", {}),
    ("arwkv-test", {"gate": "none", "gate_rank": 128, "has_group_norm": True}),
    ("rad-rwkv6-test", {}),
    ("rad-rwkv6-test", {"balance_state": False, "gate": "low-rank", "gate_rank": 6}),
    ("rad-rwkv7-test", {}),
    ("rad-rwkv7-test", {"balance_state": False, "has_group_norm": True, "rope_theta": None}),
    ("arwkv-hybrid-test", {"attention_rope_theta": 5e5, "attention_bias": False}),
    ("rad-rwkv7-test", {"attention_layers": (0,), "rope_theta": None, "attention_rope_theta": 1e4}),
    ("rad-rwkv6-test", {"attention_layers": (1,)}),
]


def saved(path, name, **overrides):
    model = randomised(name, dtype=torch.float32, **overrides)
    save_model(model, path)
    return model


def same(path, model):
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == model.config
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(checkpoint[name], weight, err_msg=name)
    return checkpoint


def bare(folder):
    """Leaves the folder as another program would have written it."""
    tensors = {name: np.array(t.read()) for name, t in read_safetensors(folder / "model.safetensors").tensors.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return tensors


@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_folders_of_the_published_shape_come_back(tmp_path, name, overrides):
    model = saved(tmp_path / "m.safetensors", name, **overrides)
    convert(tmp_path / "m.safetensors", tmp_path / "folder")
    same(tmp_path / "folder", model)
    bare(tmp_path / "folder")
    same(tmp_path / "folder", model)
    kinds = {"arwkv": "rwkv_hybrid", "rad-rwkv6": "rwkv6qwen2", "rad-rwkv7": "rwkv7qwen2"}
    settings = json.loads((tmp_path / "folder" / "config.json").read_text("utf-8"))
    assert settings["model_type"] == kinds[model.family]


@pytest.mark.parametrize(("name", "overrides"), MODELS[:3])
@pytest.mark.parametrize("ours", [True, False])
def test_gguf_comes_back(tmp_path, name, overrides, ours):
    if name == "rad-rwkv6-test":
        overrides = overrides | {"num_attention_heads": 2}  # llama.cpp knows heads that make up the width
    model = saved(tmp_path / "m.safetensors", name, **overrides)
    convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    if not ours:
        whole = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole.replace(b"rookery.metadata", b"nobody.metadata!"[:16]))
    checkpoint = same(tmp_path / "m.gguf", model)
    assert checkpoint.family.name == model.family
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    architecture = {"arwkv": "arwkv7", "rad-rwkv6": "rwkv6qwen2"}[model.family]
    assert fields["general.architecture"].contents() == architecture
    assert fields[f"{architecture}.token_shift_count"].contents() == 1


def test_the_signals_of_rwkv6qwen2_lie_in_llama_cpps_order(tmp_path):
    model = saved(tmp_path / "m.safetensors", "rad-rwkv6-test", num_attention_heads=2)
    convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    own = model.state_dict()
    at, rank = "model.layers.1.self_attn.", model.config.mix_rank
    slices = own[at + "time_maa_w1"].numpy().T.reshape(5, rank, -1)  # r k v w g
    np.testing.assert_array_equal(tensors["blk.1.time_mix_w1.weight"].reshape(5, rank, -1), slices[[3, 1, 2, 0, 4]])
    second = own[at + "time_maa_w2"].numpy().swapaxes(1, 2)[[3, 1, 2, 0, 4]]
    np.testing.assert_array_equal(tensors["blk.1.time_mix_w2.weight"].reshape(second.shape), second)
    fused = np.stack([own[at + f"time_maa_{c}"].numpy().ravel() for c in "wkvrg"])
    np.testing.assert_array_equal(tensors["blk.1.time_mix_lerp_fused.weight"].reshape(fused.shape), fused)


def test_what_llama_cpp_cannot_run_is_not_written(tmp_path):
    saved(tmp_path / "low.safetensors", "rad-rwkv6-test", gate="low-rank", gate_rank=6, num_attention_heads=2)
    saved(tmp_path / "wide.safetensors", "rad-rwkv6-test")
    saved(tmp_path / "delta.safetensors", "arwkv-test", gate="delta")
    saved(tmp_path / "seven.safetensors", "rad-rwkv7-test")
    saved(tmp_path / "hybrid.safetensors", "arwkv-hybrid-test")
    kinds = {"hybrid": "arwkv with softmax attention in 2 blocks"}
    for name in ("low", "wide", "delta", "seven", "hybrid"):
        kind = kinds.get(name, "")
        with pytest.raises(ValueError, match=f"{kind} cannot be written as gguf; it can as official, pth"):
            convert(tmp_path / f"{name}.safetensors", tmp_path / "x.gguf")
        assert not (tmp_path / "x.gguf").exists()


def test_tensors_that_idle_are_dropped_and_named(tmp_path):
    model = randomised("rad-rwkv7-test", dtype=torch.float32)
    at = "model.layers.1.self_attn."
    idle = {at + "r_k": torch.ones(4, 16), at + "k_k": torch.ones(1, 1, 64), at + "ln_x.weight": torch.ones(64)}
    torch.save(model.state_dict() | idle, tmp_path / "m.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 32}))
    with pytest.raises(
        BadCheckpoint, match="the head size is not in the tensors, and 64 does not divide the 64 query and 32"
    ):
        open_checkpoint(tmp_path / "m.pth")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.unused) == set(idle)
    load(tmp_path).load_state_dict(model.state_dict() | idle)


def test_tensors_missing_are_named(tmp_path):
    for name, missing in [
        ("arwkv-test", "model.layers.0.self_attn.time_mixer.w1"),
        ("rad-rwkv6-test", "model.layers.0.self_attn.time_decay_w1"),
        ("rad-rwkv7-test", "model.layers.0.self_attn.g1"),
        ("arwkv-test", "model.layers.0.mlp.gate_proj.weight"),
        ("rad-rwkv6-test", "model.layers.0.self_attn.k_proj.weight"),
    ]:
        weights = randomised(name, head_dim=16, dtype=torch.float32).state_dict()
        del weights[missing]
        torch.save(weights, tmp_path / "m.pth")
        (tmp_path / "config.json").write_text(json.dumps({"head_dim": 16}))
        with pytest.raises(BadCheckpoint, match=f"{missing!r} is missing"):
            open_checkpoint(tmp_path)
