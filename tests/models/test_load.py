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


# rwkv.cpp's models (core.md 4.1)

PROMPT = torch.tensor([[0x22, 0x69, 0x6E]])
ANCHORS = {0: -0.03215, 10: -0.36072, 32: 2.61519, 97: 0.56818, 101: 1.82707, 116: 2.13324, 255: -0.95428}


@torch.no_grad()
def logits(kind, dtype):
    model = rookery.load(shared(f"models/rwkv_cpp/tiny-rwkv-7v0-834K-{kind}.bin"), dtype=dtype)
    return model(PROMPT)[0][0, -1].double()


@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("FP32", torch.float32, 5e-6),
        ("FP32", torch.float64, 5e-6),
        ("FP16", torch.float32, 2 * 3.8e-7),
        ("Q5_0", torch.float32, 2 * 3.7e-3),
        ("Q5_1", torch.float32, 2 * 4.2e-3),
    ],
)
def test_the_reference_logits_of_rwkv_cpp_are_reproduced(kind, dtype, error):
    want = torch.from_numpy(np.fromfile(shared("models/rwkv_cpp/expected-logits-7v0-834K.bin"), "<f4")).double()
    torch.testing.assert_close(logits(kind, dtype), want, rtol=0, atol=error)


@pytest.mark.data
def test_the_published_values_of_the_reference_logits_hold():
    got = logits("FP32", torch.float32)
    for token, value in ANCHORS.items():
        assert got[token].item() == pytest.approx(value, abs=1e-5), token
    assert got.argmax() == 32
    assert got.sum().item() == pytest.approx(-81.4331, abs=1e-4)
    assert got.norm().item() == pytest.approx(11.09919, abs=1e-5)
    assert got.logsumexp(0).item() == pytest.approx(5.48879, abs=1e-5)
