"""Packed matrices: their bytes, the products of the compiled kernels with them, and files of them."""

import json
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from support.language import randomise

from rookery import LLM, _native
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.checkpoints.pack import FORMATS, GROUP, LEVELS, for_runtime, pack, packed_size, repack, unpack
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.checkpoints.source import Packed, Stored
from rookery.engine.runners.native import NativeRunner
from rookery.errors import BadCheckpoint, UnknownName
from rookery.models import create_model, load, save_model

ISAS = [*_native.available_isas(), *_native.imitated_isas()]
SHAPES = [(48, 64), (77, 201), (130, 320)]
"""Outputs and inputs: whole groups and panels, and neither."""
ODD = {"hidden_size": 96, "head_dim": 48, "num_hidden_layers": 3, "intermediate_size": 201, "vocab_size": 77}
FAMILIES = {"rwkv4": {}, "rwkv5": {}, "rwkv6": {}, "rwkv7": ODD}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def packed(format, order, out, inputs):
    """A packed matrix [out, inputs]; those of GGUF files only for inputs of whole groups."""
    weights = normal(out, inputs)
    if format in FORMATS:
        return pack(weights, format, order)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[format.upper()])
    return repack(blocks, format, order, (out, inputs))


def as_integers(x, group):
    """Whole numbers [tokens, groups, group] and their scales [tokens, groups], in float32 as in the kernels."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    size = np.abs(x).max(-1)
    inverse = np.divide(np.float32(127), size, out=np.zeros_like(size), where=size > 0)
    return np.rint(x * inverse[..., None]), size / np.float32(127)


def product(weights, format, order, shape, x, isa, begin=0, end=None, sparse=False):
    y = np.full((len(x), shape[0]), np.nan, np.float32)
    _native.product(weights, format, order, *shape, x, y, begin, shape[0] if end is None else end, sparse, isa)
    return y


def expected_product(weights, format, order, shape, x):
    """The contract: whole numbers within groups, float32 between them, groups in parts of 128 inputs."""
    group = GROUP[format]
    numbers, scales = as_integers(x, group)
    padded = numbers.shape[1] * group
    dense = unpack(weights, format, order, shape)

    w = np.pad(dense, ((0, 0), (0, padded - shape[1]))).reshape(shape[0], -1, group)
    w_scales = scales_of(weights, format, order, shape)
    w = np.rint(np.divide(w, w_scales[..., None], out=np.zeros_like(w), where=w_scales[..., None] != 0))
    dots = np.einsum("tgi,ogi->tog", numbers, w.astype(np.float64)).astype(np.float32)  # exact: whole numbers < 2^24
    terms = dots * (w_scales[None] * scales[:, None])
    total = np.zeros(dots.shape[:2], np.float32)
    for start in range(0, terms.shape[2], 128 // group):
        part = np.zeros_like(total)
        for g in range(start, min(start + 128 // group, terms.shape[2])):
            part += terms[..., g]
        total += part
    return total


def scales_of(weights, format, order, shape):
    """float32 [out, groups], read off the bytes by another way than `unpack`."""
    out, inputs = shape
    groups = -(-inputs // GROUP[format])
    if order == "rows":
        panels = weights.reshape(-(-out // 16), -1)
        scales = np.stack([panel[: groups * 32].view(np.float16).reshape(groups, 16).T for panel in panels])
        return scales.reshape(-1, groups)[:out].astype(np.float32)
    return np.stack([block[: 2 * out].view(np.float16) for block in weights.reshape(groups, -1)], 1).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("format", GROUP)
def test_products_are_those_of_the_contract_bit_for_bit(format, order, isa):
    shapes = SHAPES if format in FORMATS else [(48, 64), (77, 320)]
    for shape in shapes:
        weights = packed(format, order, *shape)
        x = normal(30, shape[1], seed=1)
        x[:, ::3] = 0
        expected = expected_product(weights, format, order, shape, x)
        for tokens in (1, 2, 3, 4, 7, 8, 13, 30):
            y = product(weights, format, order, shape, x[:tokens], isa)
            np.testing.assert_array_equal(y, expected[:tokens], err_msg=f"{shape}, {tokens} tokens")
        if order == "columns":
            for tokens in (1, 3):
                y = product(weights, format, order, shape, x[:tokens], isa, sparse=True)
                np.testing.assert_array_equal(y, expected[:tokens])
        part = product(weights, format, order, shape, x[:3], isa, begin=5, end=35)
        np.testing.assert_array_equal(part[:, 5:35], expected[:3, 5:35])
        assert np.isnan(part[:, [*range(5), *range(35, shape[0])]]).all()


@pytest.mark.parametrize("format", GROUP)
def test_products_are_within_the_bound_of_rounded_inputs(format):
    shape = (77, 320)
    weights, x = packed(format, "rows", *shape), normal(5, 320, seed=2)
    dense = unpack(weights, format, "rows", shape).astype(np.float64)
    _, scales = as_integers(x, GROUP[format])
    sizes = np.abs(dense).reshape(77, -1, GROUP[format]).sum(-1)
    bound = scales / 2 @ sizes.T + 1e-5 * np.abs(x) @ np.abs(dense).T
    assert (np.abs(product(weights, format, "rows", shape, x, "") - x @ dense.T) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_codes_are_the_nearest_and_those_of_every_instruction_set(format, dtype, isa):
    weights = (normal(33, 201) / 50).astype(dtype)
    weights[3] = 0
    weights[4] *= np.asarray(1e-4, dtype)
    raw = weights.view(np.uint16) if dtype is ml_dtypes.bfloat16 else weights
    for order in ("rows", "columns"):
        one = np.empty(packed_size(format, order, 33, 201), np.uint8)
        _native.pack(raw, format, order, one, 2, isa)
        np.testing.assert_array_equal(one, pack(weights, format, order))
        back, exact = unpack(one, format, order, (33, 201)), weights.astype(np.float64)
        scales = np.repeat(scales_of(one, format, order, (33, 201)), GROUP[format], axis=1)[:, :201].astype(np.float64)
        levels = LEVELS[format].astype(np.float64) if format in LEVELS else np.arange(-127, 128.0)
        nearest = np.abs(exact[..., None] - scales[..., None] * levels).min(-1)
        assert (np.abs(back - exact) <= nearest + 1e-3 * np.abs(scales) * np.abs(levels).max()).all()
        assert (back[3] == 0).all()
        error = np.sqrt(((back - exact) ** 2).mean() / (exact**2).mean())
        assert error < {"int8": 0.0065, "int4": 0.076}[format]


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_blocks_of_gguf_files_keep_their_numbers(format, order):
    kind = gguf.GGMLQuantizationType[format.upper()]
    blocks = gguf.quants.quantize(normal(33, 96), kind)
    mine = unpack(repack(blocks, format, order, (33, 96)), format, order, (33, 96))
    np.testing.assert_array_equal(mine, gguf.quants.dequantize(blocks, kind))


def six_bits(out, inputs):
    """Blocks of a Q6_K matrix: random bytes, scales that are no powers of two; the gguf package cannot make them."""
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (out, inputs // 256, 210), np.uint8)
    blocks[..., 208:] = random.uniform(1e-3, 2e-3, (out, inputs // 256, 1)).astype(np.float16).view(np.uint8)
    return blocks


def expected_of_six_bits(blocks, x):
    """As `expected_product`: whole numbers times those of runs within groups of 64, then one product a group."""
    numbers, scales = as_integers(x, 64)
    of_blocks = blocks[..., 208:].copy().view(np.float16).astype(np.float32)[..., 0]
    blocks = blocks.copy()
    blocks[..., 208:] = np.array([1], np.float16).view(np.uint8)
    whole = gguf.quants.dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType.Q6_K)
    dots = np.einsum("tgi,ogi->tog", numbers, whole.reshape(len(blocks), -1, 64).astype(np.float64)).astype(np.float32)
    terms = dots * (np.repeat(of_blocks, 4, axis=1) * scales[:, None])
    total = np.zeros(dots.shape[:2], np.float32)
    for first, second in zip(terms[..., ::2].transpose(2, 0, 1), terms[..., 1::2].transpose(2, 0, 1), strict=True):
        total += first + second
    return total


@pytest.mark.parametrize("isa", ISAS)
def test_products_with_six_bits_are_those_of_the_contract_bit_for_bit(isa):
    blocks, x = six_bits(37, 768), normal(20, 768, seed=1)
    x[:, ::5] = 0
    weights = repack(blocks, "q6_k", "rows", (37, 768))
    assert len(weights) == _native.packed_size("q6_k", "rows", 37, 768)
    expected = expected_of_six_bits(blocks, x)
    for tokens in (1, 3, 4, 20):
        y = product(weights, "q6_k", "rows", (37, 768), x[:tokens], isa)
        np.testing.assert_array_equal(y, expected[:tokens])
    exact = x @ gguf.quants.dequantize(blocks.reshape(37, -1), gguf.GGMLQuantizationType.Q6_K).T
    assert np.abs(expected - exact).max() < 0.01 * np.abs(exact).max()


def test_a_matrix_of_six_bits_is_multiplied_as_it_is_where_rows_are_read():
    blocks = six_bits(16, 256)
    tensor = Stored((16, 256), np.dtype(np.float32), blocks.copy, "Q6_K", 0, Packed("q6_k", "blocks", lambda: blocks))
    bytes, *how = for_runtime("head.weight", tensor, None)
    np.testing.assert_array_equal(bytes, repack(blocks, "q6_k", "rows", (16, 256)))
    assert how == ["q6_k", "rows"]
    assert for_runtime("blocks.0.ffn.value.weight", tensor, None) is None
    with pytest.raises(ValueError, match="q6_k is laid out by rows only"):
        _native.repack(blocks.reshape(-1), "q6_k", "columns", 16, 256, bytes)


@pytest.mark.parametrize("format", GROUP)
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_sizes_are_those_of_the_runtime(format, order):
    for out, inputs in [*SHAPES, (1, 1), (0, 5), (16, 64)]:
        assert packed_size(format, order, out, inputs) == _native.packed_size(format, order, out, inputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_so(bad, isa):
    weights = pack(normal(16, 128), "int8")
    x = normal(1, 128)
    x[0, 70] = bad
    assert not np.isfinite(product(weights, "int8", "rows", (16, 128), x, isa)).any()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A bfloat16 model file of each family."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for family, overrides in FAMILIES.items():
        paths[family] = folder / f"{family}.safetensors"
        save_model(randomise(create_model(f"{family}-test", **overrides)).to(torch.bfloat16), paths[family])
    return paths


def ids_for(runner, count=37, seed=3):
    return np.random.default_rng(seed).integers(runner.config.vocab_size, size=count).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_batches_and_threads_do_not_change_a_bit(files, family, quantize, isa):
    runner = NativeRunner(files[family], quantize=quantize, isa=isa, threads=1)
    ids = ids_for(runner)
    state = runner.init_state()
    whole = runner.forward(ids, state, "all")
    runner = NativeRunner(files[family], quantize=quantize, isa=isa, threads=2)
    for cut in (1, 3, 17):
        again = runner.init_state()
        parts = [runner.forward(ids[i : i + cut], again, "all") for i in range(0, len(ids), cut)]
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"cut {cut}")
        np.testing.assert_array_equal(again.numbers, state.numbers)
    states = [state.copy() for _ in range(7)]
    batch = runner.forward_batch(ids[:7], states)
    for row in range(7):
        np.testing.assert_array_equal(batch[row], runner.forward([ids[row]], state.copy())[0])


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_file_is_the_model_quantised_at_load(files, family, quantize, tmp_path):
    path = tmp_path / "packed.safetensors"
    convert(files[family], path, dtype=quantize)
    at_load, file = NativeRunner(files[family], quantize=quantize), NativeRunner(path)
    ids = ids_for(file)
    logits = file.forward(ids, file.init_state(), "all")
    np.testing.assert_array_equal(logits, at_load.forward(ids, at_load.init_state(), "all"))
    assert file.fingerprint() == at_load.fingerprint()
    # its numbers, read back, are those that it computes with: what is left is the rounding of inputs
    model = load(path).float()
    with torch.no_grad():
        exact = model(torch.tensor([ids]))[0][0].numpy()
    assert np.square(logits - exact).mean() < 0.03**2 * np.square(exact).mean()
    matrices = {name for name in open_checkpoint(path) if name.endswith("weight") and "ln" not in name} - {"emb.weight"}
    assert {name for name, tensor in open_checkpoint(path).tensors.items() if tensor.packed} == matrices
    assert matrices <= set(file._model.in_place)


def test_a_packed_file_can_become_any_other(files, tmp_path):
    convert(files["rwkv7"], tmp_path / "a.safetensors", dtype="int8")
    convert(tmp_path / "a.safetensors", tmp_path / "same.safetensors")
    for name, tensor in read_safetensors(tmp_path / "a.safetensors").tensors.items():
        same = read_safetensors(tmp_path / "same.safetensors").tensors[name]
        assert (same.encoding, same.shape) == (tensor.encoding, tensor.shape)
        np.testing.assert_array_equal(same.read(), tensor.read())
    convert(tmp_path / "a.safetensors", tmp_path / "float.safetensors", dtype="float32")
    convert(tmp_path / "a.safetensors", tmp_path / "m.pth")
    convert(tmp_path / "a.safetensors", tmp_path / "smaller.safetensors", dtype="int4")
    name = "blocks.1.ffn.value.weight"
    numbers = open_checkpoint(tmp_path / "a.safetensors")[name]
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "float.safetensors")[name], numbers)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m.pth")[name], numbers)
    assert open_checkpoint(tmp_path / "smaller.safetensors").tensors[name].encoding == "int4"
    # 4 bits stay 4 bits
    convert(tmp_path / "smaller.safetensors", tmp_path / "b.safetensors", dtype="int8")
    assert open_checkpoint(tmp_path / "b.safetensors").tensors[name].encoding == "int4"


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_gguf_files_run_with_the_numbers_that_they_have(files, dtype, tmp_path):
    convert(files["rwkv7"], tmp_path / "m.gguf", dtype=dtype)
    runner = NativeRunner(tmp_path / "m.gguf")
    assert runner.formats["blocks.0.ffn.value.weight"] == "float32"  # 201 inputs make no whole blocks
    assert runner.formats["blocks.0.att.key.weight"] == dtype
    ids = ids_for(runner)
    with torch.no_grad():
        exact = load(tmp_path / "m.gguf").float()(torch.tensor([ids]))[0][0].numpy()
    logits = runner.forward(ids, runner.init_state(), "all")
    assert np.square(logits - exact).mean() < 0.03**2 * np.square(exact).mean()


def test_a_head_and_an_embedding_of_six_bits_run_as_they_are(tmp_path):
    model = create_model("rwkv7-test", hidden_size=256, num_hidden_layers=1, vocab_size=77)
    save_model(model, tmp_path / "m.safetensors")
    checkpoint, tensors = open_checkpoint(tmp_path / "m.safetensors"), {}
    for name, blocks in (("head.weight", six_bits(77, 256)), ("emb.weight", six_bits(77, 256)[::-1])):
        floats = gguf.quants.dequantize(blocks.reshape(77, -1), gguf.GGMLQuantizationType.Q6_K)
        tensors[name] = Stored(
            (77, 256), floats.dtype, floats.copy, "Q6_K", blocks.nbytes, Packed("q6_k", "blocks", blocks.copy)
        )
        model.get_parameter(name).data.copy_(torch.from_numpy(floats))
    runner = NativeRunner(replace(checkpoint, tensors=checkpoint.tensors | tensors))
    assert runner.formats["head.weight"] == runner.formats["emb.weight"] == "q6_k"
    ids = ids_for(runner)
    with torch.no_grad():
        exact = model(torch.tensor([ids]))[0][0].numpy()
    logits = runner.forward(ids, runner.init_state(), "all")
    assert np.square(logits - exact).mean() < 0.03**2 * np.square(exact).mean()
    state = runner.init_state()
    np.testing.assert_array_equal(np.concatenate([runner.forward([token], state) for token in ids]), logits)


def test_llm_quantises_and_says_what_it_cannot(files, tmp_path):
    llm = LLM(files["rwkv7"], quantize="int8", tokenizer="bytes")
    assert llm.runner.formats["head.weight"] == "int8"
    assert llm.logits([1, 2]).shape == (2, 77)
    with pytest.raises(UnknownName, match="quantize='int5' is not supported; supported: 'int8', 'int4'"):
        LLM(files["rwkv7"], quantize="int5")
    with pytest.raises(ValueError, match="quantize='int8' is for the compiled runtime, device='cpu' for torch"):
        LLM(files["rwkv7"], quantize="int8", device="cpu")
    with pytest.raises(UnknownName, match="quantize 'int9' is not one of int8, int4"):
        NativeRunner(files["rwkv7"], quantize="int9")
    with pytest.raises(ValueError, match="pth files cannot hold int8; they can float32"):
        convert(files["rwkv7"], tmp_path / "m.pth", dtype="int8")
    other = tmp_path / "t.safetensors"
    save_model(create_model("transformer-test"), other)
    with pytest.raises(BadCheckpoint, match="a model of the family transformer; rwkv4, .* can be quantised as int8"):
        convert(other, tmp_path / "q.safetensors", dtype="int8")


def test_damaged_descriptions_are_refused(files, tmp_path):
    path = tmp_path / "m.safetensors"
    convert(files["rwkv7"], path, dtype="int8")
    source = read_safetensors(path)
    raw = {name: tensor.packed.data() if tensor.packed else tensor.read() for name, tensor in source.tensors.items()}
    good = json.loads(source.metadata["packed"])
    name = "head.weight"

    def refused(told, message="damaged: what it says of its packed tensors does not fit them"):
        write_safetensors(tmp_path / "bad.safetensors", raw, {**source.metadata, "packed": told})
        with pytest.raises(BadCheckpoint, match=message):
            open_checkpoint(tmp_path / "bad.safetensors")

    refused("{")
    refused("[]")
    refused(json.dumps({**good, "version": "pack-9"}), "by another version of rookery .'pack-9'.; this one")
    for key, value in (
        ("format", "int3"),
        ("format", ["int8"]),
        ("order", "blocks"),
        ("shape", [1 << 40, 96]),
        ("shape", [77, 97.0]),
        ("shape", [770, 96]),
        ("shape", 5),
    ):
        refused(json.dumps({**good, "tensors": {name: {**good["tensors"][name], key: value}}}))
    # without its description a packed tensor is no weight
    refused(json.dumps({**good, "tensors": {}}), "holds uint8 numbers, weights are floats")
