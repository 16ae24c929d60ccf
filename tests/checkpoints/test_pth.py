import collections
import functools
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from support.data import shared
from support.files import repack

from rookery.checkpoints.pth import MAX_PICKLE, read_pth
from rookery.errors import BadCheckpoint
from rookery.state import to_numpy


def saved(tmp_path, content, **options):
    path = tmp_path / "model.pth"
    torch.save(content, path, **options)
    return path


def assert_read(path, expected):
    source = read_pth(path)
    assert source.format == "pth"
    assert list(source.tensors) == list(expected)
    for name, tensor in expected.items():
        stored, want = source.tensors[name], to_numpy(tensor)
        got = stored.read()
        assert stored.shape == got.shape == want.shape, name
        assert stored.dtype == got.dtype == want.dtype, name
        assert stored.encoding == want.dtype.name
        assert stored.nbytes == want.nbytes
        assert got.tobytes() == want.tobytes(), name


TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
NEW_TYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", [*TYPES, *NEW_TYPES])
def test_numbers_of_every_type_come_back_exactly(tmp_path, dtype):
    kind = getattr(torch, dtype)
    numbers = torch.arange(12).reshape(3, 4)
    assert_read_bytes(saved(tmp_path, {"w": numbers.to(kind)}), numbers.to(kind))


def assert_read_bytes(path, tensor):
    got = read_pth(path).tensors["w"].read()
    assert got.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    assert got.dtype.name == str(tensor.dtype).removeprefix("torch.")
    assert got.shape == tuple(tensor.shape)


def test_views_and_shared_storages_come_back_as_they_were(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    content = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 3],
        "scalar": base[2, 3, 4],
        "empty": base[:0],
        "column": base[:, :, 1:2],
    }
    path = saved(tmp_path, content)
    for name, tensor in content.items():
        np.testing.assert_array_equal(read_pth(path).tensors[name].read(), tensor.numpy(), err_msg=name)
    with zipfile.ZipFile(path) as archive:
        assert len([n for n in archive.namelist() if "/data/" in n and "serialization" not in n]) == 1


def test_large_tensors_are_mapped_and_read_only(tmp_path):
    got = read_pth(saved(tmp_path, {"w": torch.ones(1000)})).tensors["w"].read()
    assert not got.flags.writeable
    while got.base is not None and not isinstance(got, np.memmap):
        got = got.base
    assert isinstance(got, np.memmap) or "mmap" in type(got).__name__


def test_parameters_and_state_dicts_of_modules_are_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    assert_read(saved(tmp_path, module.state_dict()), module.state_dict())
    assert_read(saved(tmp_path, dict(module.named_parameters())), dict(module.named_parameters()))
    assert_read(saved(tmp_path, module.state_dict(), pickle_protocol=4), module.state_dict())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_weights_are_found_inside_what_training_programs_save(tmp_path, wrapper):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 3, "loss": 0.5, "note": "x", "size": torch.Size([2]), "optimizer": optimiser, wrapper: weights}
    assert_read(saved(tmp_path, content), weights)
    assert_read(saved(tmp_path, {"model": content}), weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_dropped(tmp_path, prefix):
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(3)}
    assert_read(saved(tmp_path, {prefix + name: w for name, w in weights.items()}), weights)


def test_a_file_saved_from_a_gpu_is_read_on_the_cpu(tmp_path):
    path = saved(tmp_path, {"w": torch.arange(4.0)})
    repack(path, lambda name, raw: raw.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0") if name.endswith("pkl") else raw)
    with zipfile.ZipFile(path) as archive:
        assert b"cuda:0" in archive.read(next(n for n in archive.namelist() if n.endswith("pkl")))
    assert_read(path, {"w": torch.arange(4.0)})


@pytest.mark.data
@pytest.mark.parametrize("name", ["251016_rosa_1bit_run.pth", "251024_rosaQKV_L2_digit20.pth"])
def test_official_files_are_read_as_torch_reads_them(name):
    path = shared(f"models/rosa/{name}")
    assert_read(path, torch.load(path, map_location="cpu", weights_only=True))


# damage and malice


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, protocol):
    witness = tmp_path / "executed"
    attacks = {
        "posix.system": Evil(os.system, f"touch {witness}"),
        "builtins.eval|__builtin__.eval": Evil(eval, f"open({str(witness)!r}, 'w')"),
        "functools.partial": functools.partial(os.system, f"touch {witness}"),
        r"torch\.serialization\.load": Evil(torch.load, str(witness)),
    }
    for name, attack in attacks.items():
        for content in ({"w": torch.ones(1), "x": attack}, attack, {"model": {"w": attack}}):
            path = saved(tmp_path, content, pickle_protocol=protocol)
            with pytest.raises(BadCheckpoint, match=f"holds the name '({name})', which could run code.*was not run"):
                read_pth(path)
    assert not witness.exists()


def with_pickle(tmp_path, raw):
    path = saved(tmp_path, {"w": torch.arange(4.0)})
    return repack(path, lambda name, old: raw if name.endswith("data.pkl") else old)


GLOBAL_FLOATS = b"ctorch\nFloatStorage\n"


def tensor_pickle(count=4, offset=0, shape=(4,), strides=(1,), key="0"):
    """The pickle of {"w": tensor} with any numbers in it."""
    storage = b"(" + b"X\7\0\0\0storage" + GLOBAL_FLOATS + pickled(key) + b"X\3\0\0\0cpu" + pickled(count) + b"tQ"
    arguments = b"(" + storage + pickled(offset) + pickled(shape) + pickled(strides) + b"\x89" + b"}" + b"t"
    return b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def pickled(value):
    # without memo opcodes, so that values can stand one after the other
    import pickletools

    raw = pickletools.optimize(pickle.dumps(value, 2))
    return raw[2:-1]


def test_the_pickles_of_these_tests_are_valid(tmp_path):
    assert_read(with_pickle(tmp_path, tensor_pickle()), {"w": torch.arange(4.0)})
    assert_read(
        with_pickle(tmp_path, tensor_pickle(shape=(2, 2), strides=(1, 2))), {"w": torch.arange(4.0).view(2, 2).T}
    )


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"count": 5}, "'w' needs a storage of 20 bytes, 16 are there"),
        ({"count": 10**12, "shape": (10**12,)}, "needs a storage of 4,000,000,000,000 bytes, 16 are there"),
        ({"shape": (10**12,)}, "has 1,000,000,000,000 numbers from 0 on, its storage has 4"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "has 1,000,000,000,000 numbers from 0 on, its storage has 4"),
        ({"shape": (5,)}, "has 5 numbers from 0 on, its storage has 4"),
        ({"offset": 1}, "has 4 numbers from 1 on, its storage has 4"),
        ({"offset": -1}, "no sizes"),
        ({"shape": (-4,)}, "no sizes"),
        ({"shape": (4.0,)}, "no sizes"),
        ({"strides": (-1,)}, "no sizes"),
        ({"strides": (2,)}, "has 4 numbers from 0 on, its storage has 4"),
        ({"strides": (1, 1)}, "a tensor of 1 dimensions with 2 strides"),
        ({"shape": (1,) * 2000, "strides": (1,) * 2000}, "a tensor of 2000 dimensions"),
        ({"shape": (10**4000,)}, "no sizes"),
        ({"count": 10**4000}, "no sizes"),
        ({"shape": "four"}, "a tensor without storage or shape"),
        ({"key": "7"}, "the numbers of storage '7' are not in it"),
        ({"key": "../../etc/passwd"}, "the numbers of storage '../../etc/passwd' are not in it"),
        ({"key": 0}, "a reference that is no storage"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, lie, message):
    path = with_pickle(tmp_path, tensor_pickle(**lie))
    with pytest.raises(BadCheckpoint, match=message):
        read_pth(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\2}", "cannot be read"),
        (b"\x80\2\xff.", "cannot be read"),
        (b"t.", "cannot be read"),
        (b"h\5.", "cannot be read"),
        (b"\x80\2K\1.", "holds a int, not a dictionary"),
        (b"\x80\2}.", "holds no tensors under names"),
        (b"\x80\2}K\1K\1s.", "holds no tensors under names; its keys are '1'"),
        (b"(ios\nsystem\n.", "needs the pickle operation INST"),
        (b"(cos\nsystem\no.", "holds the name 'os.system'"),
        (b"\x80\2ccollections\nOrderedDict\n)\x81.", "needs the pickle operation NEWOBJ"),
        (b"\x80\2ccollections\nOrderedDict\n(]tR.", "cannot be read"),
        (b"\x80\2K\1)R.", "a call of something that cannot be called"),
        (b"\x80\2ctorch\nFloatStorage\n}b.", "an object with attributes of its own"),
        (b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n}b.", "an object with attributes of its own"),
        (b"\x80\2ctorch.storage\n_load_from_bytes\n(C\1xtR.", "holds the name 'torch.storage._load_from_bytes'"),
        (b"\x80\2}(K\1K\2tK\1s.", "a dictionary whose keys are no names"),
        (b"\x80\2X\1\0\0\0xQ.", "a reference that is no storage"),
        (b"\x80\4\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "cannot be read"),  # a text of 2**63 bytes
        (b"\x80\2ctorch\nSize\n((" + b"K\1" * 100 + b"ttR.", "a size that is none"),
        (b"\x80\2ctorch\ndevice\n(" + b"K\1" * 100 + b"tR.", "a call with 100 arguments"),
    ],
)
def test_pickles_that_are_no_table_of_tensors_are_refused(tmp_path, raw, message):
    with pytest.raises(BadCheckpoint, match=message):
        read_pth(with_pickle(tmp_path, raw))


def test_a_tuple_that_holds_itself_many_times_is_no_trap(tmp_path):
    # t = (t, t), forty times: 2**40 elements for whoever walks, hashes or prints it
    bomb = b")" + b"2\x86" * 40
    for raw in (
        b"\x80\2}" + bomb + b"K\1s.",
        b"\x80\2" + bomb + b"\x93.",
        b"\x80\2" + bomb + b".",
        b"\x80\2" + bomb + b"Q.",
    ):
        with pytest.raises(BadCheckpoint):
            read_pth(with_pickle(tmp_path, raw))


def test_a_table_of_absurd_size_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="its table of tensors has 16,000,001 bytes"):
        read_pth(with_pickle(tmp_path, b"N" * (MAX_PICKLE + 1)))


def test_compressed_files_are_refused(tmp_path):
    # a zip bomb is compressed; torch.save never compresses
    path = saved(tmp_path, {"w": torch.zeros(100_000)})
    repack(path, lambda name, raw: raw, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadCheckpoint, match="is compressed or encrypted; torch.save stores files as they are"):
        read_pth(path)


def test_other_zip_files_and_byte_orders_are_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(BadCheckpoint, match="a zip file but no .pth: it has 0 files named data.pkl"):
        read_pth(repack(path, lambda name, raw: None if name.endswith("data.pkl") else raw))
    path = saved(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(BadCheckpoint, match="byte order b'big'; only little is read"):
        read_pth(repack(path, lambda name, raw: b"big" if name.endswith("byteorder") else raw))


def test_an_optimiser_alone_is_no_model(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimiser.step()
    with pytest.raises(BadCheckpoint, match="holds the state of an optimiser, no model"):
        read_pth(saved(tmp_path, optimiser.state_dict()))


def test_files_converted_by_chatrwkv_are_refused(tmp_path):
    content = {"_strategy": "cpu fp32", "_version": 0.7, "_rescale_layer": 0, "emb.weight": torch.ones(2, 2)}
    with pytest.raises(BadCheckpoint, match="converted by ChatRWKV for one strategy.*use the original"):
        read_pth(saved(tmp_path, content))


def test_lists_and_single_tensors_are_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="holds a list, not a dictionary of tensors"):
        read_pth(saved(tmp_path, [torch.ones(2)]))
    with pytest.raises(BadCheckpoint, match="holds a PickledTensor, not a dictionary"):
        read_pth(saved(tmp_path, torch.ones(2)))


def test_an_ordered_dictionary_keeps_its_order(tmp_path):
    weights = collections.OrderedDict((name, torch.ones(1)) for name in "zebra")
    assert list(read_pth(saved(tmp_path, weights)).tensors) == list(dict.fromkeys("zebra"))
