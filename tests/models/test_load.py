import logging

import numpy as np
import pytest
import torch
from support.data import shared
from support.files import assert_same_weights, ggmf_weights, tiny, write_ggmf

import rookery
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.errors import BadCheckpoint
from rookery.models import create_model, save_model
from rookery.registry import families
from rookery.state import State


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_model_comes_back_the_same(tmp_path, family, dtype):
    model = tiny(f"{family}-test", dtype=dtype)
    save_model(model, tmp_path / "m.safetensors")
    back = rookery.load(tmp_path / "m.safetensors")
    assert back.config == model.config
    assert_same_weights(back, model.state_dict())
    assert back.fingerprint() == model.fingerprint() == open_checkpoint(tmp_path / "m.safetensors").fingerprint()


def test_shared_weights_stay_shared(tmp_path):
    model = tiny("transformer-test", tie_word_embeddings=True)
    save_model(model, tmp_path / "m.safetensors")
    assert "lm_head.weight" not in read_safetensors(tmp_path / "m.safetensors").tensors
    back = rookery.load(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.lm_head.weight.dtype == torch.bfloat16


def test_a_loaded_model_trains(tmp_path):
    save_model(tiny(), tmp_path / "m.safetensors")
    model = rookery.load(tmp_path / "m.safetensors")
    model(torch.tensor([[1, 2, 3]]))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        model.emb.weight.zero_()  # its own memory: the file is mapped read-only
    assert rookery.load(tmp_path / "m.safetensors").emb.weight.any()


def test_an_official_state_dict_loads_strictly_without_what_nobody_uses():
    model = create_model("rwkv7-test")
    official = dict(tiny().state_dict()) | {f"blocks.0.att.v{i}": torch.ones(3) for i in range(3)}
    model.load_state_dict(official, strict=True)
    assert_same_weights(model, tiny().state_dict())
    assert "blocks.0.att.v0" in official, "the caller's dictionary is left alone"
    wrapped = torch.nn.ModuleDict({"lm": create_model("rwkv7-test")})
    wrapped.load_state_dict({f"lm.{name}": weight for name, weight in official.items()}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.att\.v3"):
        model.load_state_dict(official | {"blocks.0.att.v3": torch.ones(3)})


def test_loading_says_once_what_it_drops(tmp_path, caplog):
    torch.save(tiny().state_dict() | {f"blocks.0.att.v{i}": torch.ones(3) for i in range(3)}, tmp_path / "m.pth")
    with caplog.at_level(logging.INFO, logger="rookery"):
        model = rookery.load(tmp_path / "m.pth")
    assert_same_weights(model, tiny().state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'm.pth'}: not used by rwkv7: blocks.0.att.v0, blocks.0.att.v1, blocks.0.att.v2"
    ]


def test_missing_and_unknown_weights_are_refused_by_name(tmp_path):
    weights = tiny().state_dict()
    del weights["blocks.2.att.r_k"]
    torch.save(weights | {"surprise": torch.ones(1)}, tmp_path / "m.pth")
    with pytest.raises(BadCheckpoint, match=r"1 missing: 'blocks.2.att.r_k'; 1 unknown: 'surprise'"):
        rookery.load(tmp_path / "m.pth")


def test_a_model_has_one_dtype_that_of_most_numbers_in_the_file(tmp_path):
    weights = {n: w.astype(np.float16) if w.ndim == 2 else w for n, w in ggmf_weights(tiny()).items()}
    model = rookery.load(write_ggmf(tmp_path / "m", weights))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model = rookery.load(tmp_path / "m", dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_rounded_copy_goes_by_the_name_of_its_original_until_it_is_trained(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "m")
    source = read_safetensors(tmp_path / "m")
    rounded = {name: tensor.read().astype(np.float16) * np.float16(1.1) for name, tensor in source.tensors.items()}
    write_safetensors(tmp_path / "copy", rounded, source.metadata)
    copy = rookery.load(tmp_path / "copy")
    assert copy.fingerprint() == model.fingerprint()
    model(torch.tensor([[1, 2, 3]]))[1].save(tmp_path / "story.state", model)
    assert State.load(tmp_path / "story.state", copy).tokens_seen.tolist() == [3]
    with torch.no_grad():
        copy.emb.weight.add_(1)
    assert copy.fingerprint() != model.fingerprint()


# rwkv.cpp's models (core.md 4.1): logits after three bytes

PROMPT = torch.tensor([[0x22, 0x69, 0x6E]])
MODELS = {"4v0": "4v0-660K", "5v2": "5v2-730K", "7v0": "7v0-834K"}
ANCHOR_TOKENS = (0, 10, 32, 97, 101, 116, 255)
ANCHORS = {
    "4v0": (-0.88495, -4.65106, 5.12699, 3.36829, 2.21009, 5.42481, -0.89807),
    "5v2": (-3.65706, -1.70667, 4.21018, 0.84635, 0.80760, 1.23509, -3.68805),
    "7v0": (-0.03215, -0.36072, 2.61519, 0.56818, 1.82707, 2.13324, -0.95428),
}
SUMMARIES = {
    "4v0": (-9.5188, 24.90109, 7.73203, 115),
    "5v2": (-766.3379, 56.95988, 7.57027, 112),
    "7v0": (-81.4331, 11.09919, 5.48879, 32),
}
"""Sum, L2 norm, logsumexp and arg-max of the expected logits."""
ERRORS = {
    "4v0": {"FP32": 5e-6, "FP16": 2 * 1.6e-3, "Q5_0": 2 * 0.123, "Q5_1": 2 * 0.096},
    "5v2": {"FP32": 5e-6, "FP16": 2 * 2.5e-3, "Q5_0": 2 * 0.510, "Q5_1": 2 * 0.371},
    "7v0": {"FP32": 5e-6, "FP16": 2 * 3.8e-7, "Q5_0": 2 * 3.7e-3, "Q5_1": 2 * 4.2e-3},
}
"""Greatest difference: twice that of an independent implementation which dequantises to float as we do."""


@torch.no_grad()
def logits(name, kind, dtype=torch.float32):
    model = rookery.load(shared(f"models/rwkv_cpp/tiny-rwkv-{MODELS[name]}-{kind}.bin"), dtype=dtype)
    return model(PROMPT)[0][0, -1].double()


@pytest.mark.data
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, errors in ERRORS.items() for kind in errors])
def test_the_reference_logits_of_rwkv_cpp_are_reproduced(name, kind):
    want = np.fromfile(shared(f"models/rwkv_cpp/expected-logits-{MODELS[name]}.bin"), "<f4")
    want = torch.from_numpy(want).double()
    torch.testing.assert_close(logits(name, kind), want, rtol=0, atol=ERRORS[name][kind])
    if kind == "FP32":
        torch.testing.assert_close(logits(name, kind, torch.float64), want, rtol=0, atol=5e-6)


@pytest.mark.data
@pytest.mark.parametrize("name", MODELS)
def test_the_published_values_of_the_reference_logits_hold(name):
    got = logits(name, "FP32")
    for token, value in zip(ANCHOR_TOKENS, ANCHORS[name], strict=True):
        assert got[token].item() == pytest.approx(value, abs=2e-5), token
    total, norm, logsumexp, best = SUMMARIES[name]
    assert got.sum().item() == pytest.approx(total, abs=1e-3)
    assert got.norm().item() == pytest.approx(norm, abs=2e-5)
    assert got.logsumexp(0).item() == pytest.approx(logsumexp, abs=2e-5)
    assert got.argmax() == best
