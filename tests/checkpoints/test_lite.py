"""Manifests and files of compressed models: what is damaged is refused in one sentence."""

import json

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.checkpoints.lite import Head, LowRank, Manifest, Sparsity, manifest_of
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.compress import Settings, compress
from rookery.engine.llm import LLM
from rookery.engine.runners.native import NativeRunner
from rookery.errors import BadCheckpoint
from rookery.models import save_model

SPARSE = Sparsity(rank=4, thresholds=[0.7, None], quantiles=[0.9, None])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lite")
    save_model(randomised("rwkv7-test", dtype=torch.float32), folder / "plain.safetensors")
    settings = Settings(
        samples=200, clusters=6, embedding_rows=4, least_zeros=0.0, low_rank=4, predictor=4, epochs=2, head_steps=5
    )
    compress(folder / "plain.safetensors", folder / "small.safetensors", settings)
    return folder / "small.safetensors"


def test_a_manifest_survives_a_file():
    manifest = Manifest(
        low_rank=LowRank(divisor=8), sparsity=SPARSE, embedding_rows=9, head=Head(clusters=5), int8=True
    )
    assert manifest_of({"lite": manifest.to_json()}, "x") == manifest
    assert manifest_of({}, "x") is None
    assert manifest.sparsity.is_sparse(0)
    assert not manifest.sparsity.is_sparse(1)
    assert manifest.techniques()[0] == "low-rank projections (width / 8)"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: LowRank(divisor=0), "divisor 0 is not 1 or more"),
        (lambda: LowRank(divisor=2, kind="enhanced"), "the only one that a trained matrix becomes"),
        (lambda: Sparsity(rank=0, bits=0), "need a predictor, a shadow or both"),
        (lambda: Sparsity(thresholds=[0.5], quantiles=[]), "an entry for every layer"),
        (
            lambda: Sparsity(rank=0, thresholds=[0.5], quantiles=[0.5]),
            "a threshold and nothing that it is for",
        ),
        (lambda: Head(clusters=0), "the head has 0 clusters"),
    ],
)
def test_manifests_that_mean_nothing_are_refused(wrong, said):
    part = wrong()
    names = {LowRank: "low_rank", Sparsity: "sparsity", Head: "head"}
    with pytest.raises(ValueError, match=said):
        Manifest(**{names[type(part)]: part})


def changed(path, out, *, metadata=None, without=(), tensors=None):
    """A copy of a file with other metadata or tensors."""
    source = read_safetensors(path)
    raw = {name: tensor.read() for name, tensor in source.lite.items() if name not in without}
    write_safetensors(out, {**raw, **(tensors or {})}, {**source.metadata, **(metadata or {})})
    return out


def test_a_manifest_of_another_version_or_none_at_all_is_refused(small, tmp_path):
    manifest = json.loads(read_safetensors(small).metadata["lite"])
    out = tmp_path / "x.safetensors"
    changed(small, out, metadata={"lite": json.dumps({**manifest, "version": "lite-9"})})
    with pytest.raises(BadCheckpoint, match=r"another version of rookery \('lite-9'\).*Compress the original again"):
        open_checkpoint(out)
    for wrong in ("{", "[]", "{}", json.dumps({**manifest, "odd": 1}), json.dumps({**manifest, "embedding_rows": -1})):
        changed(small, out, metadata={"lite": wrong})
        with pytest.raises(BadCheckpoint, match="its manifest cannot be read"):
            open_checkpoint(out)


@pytest.mark.parametrize(
    "name", ["head.order", "head.starts", "blocks.0.ffn.shadow", "blocks.1.att.key1.weight", "head_l1.weight"]
)
def test_missing_tensors_are_told(small, tmp_path, name):
    changed(small, tmp_path / "x.safetensors", without=[name])
    with pytest.raises(BadCheckpoint, match=rf"{name}|does not fit its tensors"):
        NativeRunner(tmp_path / "x.safetensors")


def test_tensors_that_do_not_fit_are_told(small, tmp_path):
    source = read_safetensors(small).lite
    out = tmp_path / "x.safetensors"
    order = source["head.order"].read().copy()
    order[0] = 10**6
    starts = source["head.starts"].read()[::-1].copy()
    for tensors in (
        {"head.order": order},
        {"head.starts": starts},
        {"blocks.0.ffn.shadow": np.zeros((1, 3, 4), np.uint8)},
        {"blocks.0.mlp.fc2.weight": np.zeros((5, 4), np.float32)},
        {"blocks.0.ffn.neurons": np.zeros((5, 4), np.float32)},
        {"blocks.1.att.key1.weight": np.zeros((5, 4), np.float32)},
    ):
        changed(small, out, tensors=tensors)
        with pytest.raises(BadCheckpoint, match="compress the original again|does not fit"):
            NativeRunner(out)
    manifest = json.loads(read_safetensors(small).metadata["lite"])
    manifest["sparsity"]["thresholds"] = manifest["sparsity"]["quantiles"] = [0.5]
    changed(small, out, metadata={"lite": json.dumps(manifest)})
    with pytest.raises(BadCheckpoint, match="thresholds of 1 layers, the model has 3"):
        NativeRunner(out)


def test_converting_gives_the_plain_model(small, tmp_path):
    convert(small, tmp_path / "plain.pth")
    plain, origin = open_checkpoint(tmp_path / "plain.pth"), open_checkpoint(small)
    assert plain.shapes == origin.shapes
    for name in ("blocks.0.ffn.key.weight", "blocks.2.ffn.value.weight", "head.weight", "blocks.1.att.key.weight"):
        np.testing.assert_array_equal(plain[name].astype(np.float32), origin[name].astype(np.float32))
    convert(small, tmp_path / "plain.safetensors", dtype="float32")
    assert "lite" not in open_checkpoint(tmp_path / "plain.safetensors").metadata


def test_a_compressed_model_is_not_quantised_on_the_way(small):
    with pytest.raises(BadCheckpoint, match="is compressed and cannot be quantised on the way"):
        LLM(small, quantize="int8")


def test_torch_runs_the_plain_model(small):
    assert LLM(small, device="cpu").logits([1, 2, 3]).shape == (3, 64)
