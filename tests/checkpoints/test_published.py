"""Names that other projects publish, tensor by tensor, and transformers' own RWKV-4."""

import json

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.models import load, save_model


def arrays(model):
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def assert_weights(checkpoint, model, skip=()):
    for name, weight in arrays(model).items():
        if not name.endswith(skip):
            np.testing.assert_array_equal(checkpoint[name], weight, err_msg=name)


@pytest.mark.parametrize("name", ["rwkv4-test", "rwkv5-test", "rwkv6-test", "rwkv7-test"])
def test_web_rwkv_files_are_read(tmp_path, name):
    model = tiny(name)
    renamed = {}
    for key, weight in arrays(model).items():
        transposed = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
        if key.endswith(transposed) or (name == "rwkv7-test" and key[-2:] in {c + i for c in "wavg" for i in "12"}):
            weight = np.ascontiguousarray(weight.swapaxes(-1, -2))
        renamed[key.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")] = weight
    write_safetensors(tmp_path / "m.st", renamed, {})
    checkpoint = open_checkpoint(tmp_path / "m.st")
    assert checkpoint.family.name == name[:5]
    assert checkpoint.layout == ("official" if name == "rwkv4-test" else "web-rwkv")
    assert_weights(checkpoint, model)


def test_fla_holds_the_five_signals_of_rwkv6_with_r_first(tmp_path):
    model = tiny("rwkv6-test")
    own, config = arrays(model), model.config
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m", to="fla")
    theirs = {n: t.read() for n, t in read_safetensors(tmp_path / "m" / "model.safetensors").tensors.items()}
    at, rank, width = "model.layers.1.attn.", config.mix_rank, config.hidden_size
    for i, letter in enumerate("rwkvg"):
        j, rows = "wkvrg".index(letter), slice(i * rank, (i + 1) * rank)
        own_rows = slice(j * rank, (j + 1) * rank)
        first, second = theirs[f"{at}x_proj.0.linear.weight"], theirs[f"{at}x_proj.2.weight"]
        np.testing.assert_array_equal(first[rows], own["blocks.1.att.time_maa_w1"][:, own_rows].T)
        np.testing.assert_array_equal(second[:, rows], own["blocks.1.att.time_maa_w2"][j].T)
        bias = theirs[f"{at}x_bias"]
        np.testing.assert_array_equal(bias[i], own[f"blocks.1.att.time_maa_{letter}"].reshape(-1))
    assert second.shape == (width, 5 * rank)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (settings["num_heads"], settings["proj_low_rank_dim"]) == (config.num_heads, rank)


def test_fla_settings_of_rwkv7_are_those_of_the_model(tmp_path):
    model = tiny("rwkv7-test")
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    expected = {"head_dim": 16, "vocab_size": 64, "decay_low_rank_dim": 8, "a_low_rank_dim": 6, "v_low_rank_dim": 4}
    assert {key: settings[key] for key in expected} == expected
    assert (settings["gate_low_rank_dim"], settings["value_dim"], settings["model_type"]) == (10, [32] * 3, "rwkv7")


@pytest.mark.peer
def test_transformers_runs_our_rwkv4_folder_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    from support.language import randomised

    model = randomised("rwkv4-test", dtype=torch.float32, vocab_size=256)
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m")
    theirs = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokens = torch.arange(40)[None] * 7 % 256
    with torch.no_grad():
        got = theirs(tokens).logits
        expected, _ = load(tmp_path / "m")(tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
