"""Compressed files: torch and the compiled runtime give the same numbers, and read no more than the formula says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.language import ROUNDING_ISAS, randomised, some_tokens

import rookery
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.checkpoints.lite import read_manifest
from rookery.checkpoints.pack import unpack
from rookery.compress import Settings, compress, compress_model, load
from rookery.compress.pipeline import written
from rookery.engine.llm import LLM
from rookery.engine.memory import formula
from rookery.engine.runners.native import NativeRunner
from rookery.errors import BackendUnavailable, BadCheckpoint
from rookery.models import create_model, save_model

FAMILIES = ("rwkv7", "rwkv6", "rwkv5", "rwkv4")
TINY = Settings(
    samples=300, clusters=8, embedding_rows=5, fewest=2, most=6, least_zeros=0.0, predictor=6, epochs=8, head_steps=20
)
EVERYTHING = replace(TINY, low_rank=4, shadow_quantile=0.7)


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request, tmp_path_factory):
    """A file with a random model of each family."""
    path = tmp_path_factory.mktemp("plain") / f"{request.param}.safetensors"
    save_model(randomised(f"{request.param}-test", dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def small(plain):
    """The same compressed with everything but 8 bits."""
    return compressed(plain, EVERYTHING)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A file with a random RWKV-7, beside it the same compressed."""
    path = tmp_path_factory.mktemp("seven") / "plain.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def small7(seven):
    return compressed(seven, EVERYTHING)


def compressed(path, settings):
    out = path.with_name("small-" + path.name)
    compress(path, out, settings)
    return out


def tokens(model, count=40):
    return some_tokens(model, 1, count, seed=7)


def run(path, ids, *, one_by_one=False, **options):
    runner = NativeRunner(path, **options)
    state = runner.init_state()
    if one_by_one:
        return np.concatenate([runner.forward([token], state) for token in ids]), runner
    return runner.forward(ids, state, "all"), runner


def exact_isas():
    """Those that round nothing: where inputs of bfloat16 matrices are rounded, some guesses fall out differently."""
    from rookery import _native

    return [isa for isa in _native.available_isas() if isa not in ROUNDING_ISAS]


def test_torch_and_the_runtime_compute_the_same(small):
    model = load(small, dtype=torch.float32)
    ids = tokens(model)
    got, _ = run(small, ids[0].tolist(), isa=exact_isas()[-1])
    np.testing.assert_allclose(got, model(ids)[0][0], rtol=1e-4, atol=2e-5)


def test_results_do_not_depend_on_cuts_threads_or_instruction_sets(small):
    ids = tokens(load(small))[0].tolist()
    whole, _ = run(small, ids)
    np.testing.assert_array_equal(run(small, ids, one_by_one=True)[0], whole)
    np.testing.assert_array_equal(run(small, ids, threads=3)[0], whole)
    first, *others = (run(small, ids, isa=isa)[0] for isa in exact_isas())
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=2e-5)


def test_all_units_and_clusters_give_the_plain_model_bit_for_bit(plain, tmp_path):
    dense, out = tmp_path / "bfloat16.safetensors", tmp_path / "all.safetensors"
    save_model(rookery.load(plain, dtype=torch.bfloat16), dense)
    compress(dense, out, replace(TINY, threshold=0.0, fewest=8, most=8))
    ids = tokens(load(out))[0].tolist()
    for one_by_one in (False, True):
        want, _ = run(dense, ids, one_by_one=one_by_one)
        np.testing.assert_array_equal(run(out, ids, one_by_one=one_by_one)[0], want)


@pytest.mark.parametrize("int8", [False, True])
def test_a_lean_run_gives_the_same_bits(tmp_path, int8):
    # 300 units end within a group of 64, and within a part of 128
    save_model(randomised("rwkv7-test", dtype=torch.float32, intermediate_size=300), tmp_path / "plain.safetensors")
    out = tmp_path / "small.safetensors"
    compress(tmp_path / "plain.safetensors", out, replace(EVERYTHING, int8=int8))
    ids = tokens(load(out), 60)[0].tolist()
    want, mapped = run(out, ids)
    got, lean = run(out, ids, lean=True, threads=2)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(run(out, ids, lean=True, one_by_one=True)[0], want)
    assert lean.read_counts()["head_rows"] == mapped.read_counts()["head_rows"]
    with pytest.raises(BadCheckpoint, match="is not compressed, and lean is for models that are"):
        NativeRunner(tmp_path / "plain.safetensors", lean=True)
    with pytest.raises(ValueError, match="lean is for the compiled runtime"):
        rookery.LLM(out, lean=True, device="cpu")


@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_the_cache_of_the_embedding_changes_nothing(seven, small7, capacity, tmp_path):
    model = load(small7)
    ids = (tokens(model, 80)[0] % 9).tolist()
    out = tmp_path / "other.safetensors"
    compress(seven, out, replace(EVERYTHING, embedding_rows=capacity))
    got, runner = run(out, ids)
    np.testing.assert_array_equal(got, run(small7, ids)[0])
    counts = runner.read_counts()
    from rookery.compress.embedding import hit_rate

    assert counts["hits"] == round(hit_rate(ids, capacity) * len(ids))
    assert counts["hits"] + counts["misses"] == len(ids)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_the_runtime_needs_the_bytes_of_the_formula(seven, share, tmp_path):
    out = tmp_path / "forced.safetensors"
    # a predictor that never speaks leaves the number of units to the shadow
    settings = replace(TINY, low_rank=8, threshold=1.0, shadow_quantile=1 - share, fewest=2, most=2)
    compress(seven, out, settings)
    checkpoint = open_checkpoint(out)
    ids = tokens(load(out), 30)[0].tolist()
    _, runner = run(out, ids, one_by_one=True)
    reads = runner.reads_since(dict.fromkeys(runner.read_counts(), 0))
    hidden = checkpoint.config.intermediate_size
    assert reads.units == pytest.approx(round(share * hidden) / hidden)
    assert reads.clusters == 2
    from rookery.engine.runners.lite import resident_bytes

    resident = resident_bytes(checkpoint, reads)
    wanted = formula(checkpoint.shapes, read_manifest(checkpoint), units=reads.units, rows=reads.rows)
    assert resident == pytest.approx(wanted, rel=1e-3, abs=2)


def test_eight_bits_are_within_half_a_step_and_run(plain, tmp_path):
    out = tmp_path / "int8.safetensors"
    compress(plain, out, replace(EVERYTHING, int8=True))
    checkpoint = open_checkpoint(out)
    model = load(out, dtype=torch.float32)
    ids = tokens(model)
    got, _ = run(out, ids[0].tolist())
    error = np.abs(got - model(ids)[0][0].numpy()).max(-1)
    assert np.median(error) < 0.2  # inputs are rounded, too; a unit or cluster may change sides
    np.testing.assert_array_equal(run(out, ids[0].tolist(), one_by_one=True)[0], got)
    neurons = checkpoint.lite["blocks.0.ffn.neurons"]
    assert neurons.packed is not None
    numbers = unpack(neurons.packed.data(), "int8", "columns", neurons.shape)
    key = rookery.load(plain).blocks[0].ffn.key.weight.detach().T.numpy()
    error = np.abs(numbers[: key.shape[0]] - key)
    largest = np.abs(key).reshape(key.shape[0], -1, 32 if key.shape[1] % 64 else 64).max()
    assert error.max() <= 0.51 * largest / 127


def test_the_plain_model_of_a_compressed_file_is_read_by_all(small7):
    plain, model = rookery.load(small7, dtype=torch.float32), load(small7, dtype=torch.float32)
    assert torch.equal(plain.blocks[0].ffn.value.weight, model.blocks[0].ffn.value.weight)
    low = model.blocks[0].att.key
    torch.testing.assert_close(
        plain.blocks[0].att.key.weight, low.second.weight @ low.first.weight, atol=2e-2, rtol=2e-2
    )
    assert plain.fingerprint() == open_checkpoint(small7).fingerprint()


def test_an_adapter_is_not_put_beside_a_compressed_model(tmp_path, small7):
    torch.save({"blocks.0.att.key.disha": torch.zeros(4, 32)}, tmp_path / "a.pth")
    with pytest.raises(BackendUnavailable, match="merge it into the original and compress that"):
        LLM(small7).adapted(tmp_path / "a.pth")


def test_a_dense_layer_stays_dense_and_is_told(tmp_path):
    model = randomised("rwkv7-test", dtype=torch.float32)
    with torch.no_grad():  # relu(key · x) is positive for every unit of the second layer
        model.blocks[1].ln2.weight.zero_()
        model.blocks[1].ln2.bias.fill_(1)
        model.blocks[1].ffn.key.weight.abs_()
    save_model(model, tmp_path / "plain.safetensors")
    told = []
    out = tmp_path / "out.safetensors"
    made = compress(tmp_path / "plain.safetensors", out, replace(TINY, least_zeros=0.2), say=told.append)
    assert made.manifest.sparsity.thresholds == [0.7, None, 0.7]
    assert made.zeros[1] == 0
    assert any("layer 1: 0.0% of the hidden units are zero, too few; it stays dense" in line for line in told)
    ids = tokens(model)
    got, _ = run(tmp_path / "out.safetensors", ids[0].tolist(), isa=exact_isas()[-1])
    torch_model = load(tmp_path / "out.safetensors", dtype=torch.float32)
    np.testing.assert_allclose(got, torch_model(ids)[0][0], rtol=1e-4, atol=2e-5)
    made = compress_model(randomised("rwkv7-test", dtype=torch.float32), replace(TINY, least_zeros=1.0))
    assert made.manifest.sparsity is None


def test_compressing_twice_other_families_and_numbers_out_of_range_are_refused(seven, small7, tmp_path):
    with pytest.raises(BadCheckpoint, match="is compressed already; compress the original model"):
        compress(small7, tmp_path / "x.safetensors")
    save_model(create_model("transformer-test"), tmp_path / "t.safetensors")
    with pytest.raises(BadCheckpoint, match="family transformer, which cannot be compressed; rwkv4"):
        compress(tmp_path / "t.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match="is not compressed; rookery.load reads it"):
        load(seven)
    for wrong, said in (
        ({"threshold": 1.5}, "threshold 1.5 of layer 0 must lie between 0 and 1"),
        ({"shadow_quantile": -0.1}, "quantile -0.1 of layer 0 must lie between 0 and 1"),
        ({"shadow_bits": 3}, "the shadow has 3 bits; give 1, 2, 4 or 0"),
        ({"shadow_levels": "row", "shadow_bits": 2}, "known are minmax, and row for 1 bit"),
        ({"predictor": -1}, "the predictor has -1 hidden units"),
        ({"mass": 0.0}, "mass 0.0 must lie above 0"),
        ({"fewest": 9, "most": 3}, "fewest 9 and most 3"),
        ({"embedding_rows": -2}, "the embedding cache has -2 rows"),
        ({"low_rank": -1}, "low_rank=-1 must be 0 or more"),
        ({"low_rank": 1000}, "must lie between 1 and the width"),
        ({"clusters": 1000}, "1000 clusters of"),
        ({"least_zeros": 2.0}, "least_zeros=2.0 must lie between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            compress(seven, tmp_path / "x.safetensors", replace(TINY, **wrong))
    assert not (tmp_path / "x.safetensors").exists()


def test_a_model_writes_text_of_its_own():
    model = create_model("rwkv7-test")
    one, other = written(model, 100, seed=1), written(model, 100, seed=2)
    assert len(one) >= 100
    assert torch.equal(one, written(model, 100, seed=1))
    assert not torch.equal(one, other)
