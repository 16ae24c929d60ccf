import pytest
from support.language import randomise

from rookery.checkpoints import open_checkpoint
from rookery.engine.profile import ORDER, part_of, profile, step_bytes
from rookery.engine.runners.native import NativeRunner
from rookery.models import create_model, save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
    paths = {name: folder / f"{name}.safetensors" for name in names}
    for name, path in paths.items():
        save_model(randomise(create_model(f"{name}-test")), path)
    return paths


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_every_tensor_belongs_to_a_part(files, name):
    parts = {tensor: part_of(tensor) for tensor in open_checkpoint(files[name])}
    assert parts["emb.weight"] == "embedding"
    assert parts["head.weight"] == parts["ln_out.bias"] == "head"
    assert parts["blocks.1.ln1.weight"] == "norms and shifts"
    assert parts["blocks.1.att.key.weight"] == "projections"
    assert parts["blocks.1.att.output.weight"] == "output"
    assert parts["blocks.1.ffn.value.weight"] == "channel mix"
    assert set(parts.values()) == set(ORDER)
    mixes = {"rwkv7": "att.x_r", "rwkv4": "att.time_mix_k", "rwkv5": "att.time_mix_r", "rwkv6": "att.time_maa_x"}
    assert parts[f"blocks.1.{mixes[name]}"] == "norms and shifts"
    own = {"rwkv7": "att.w2", "rwkv4": "att.time_first", "rwkv5": "att.ln_x.weight", "rwkv6": "att.time_decay_w2"}
    assert parts[f"blocks.1.{own[name]}"] == "recurrence"


def test_bytes_are_those_of_all_weights_but_the_embedding_and_of_the_state_twice(files):
    runner = NativeRunner(files["rwkv7"], quantize="int8")
    rest = sum(nbytes for name, nbytes in runner.nbytes.items() if name != "emb.weight")
    row = runner.nbytes["emb.weight"] // runner.config.vocab_size
    assert sum(step_bytes(runner, 1.0).values()) == rest + row + 2 * runner.init_state().nbytes
    assert sum(step_bytes(runner, 0.5).values()) < sum(step_bytes(runner, 1.0).values())


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_parts_take_the_time_of_a_step(files, name):
    runner = NativeRunner(files[name], threads=1)
    found = profile(runner, steps=4, rounds=3)
    assert [part.name for part in found.parts] == list(ORDER)
    assert all(part.seconds > 0 for part in found.parts)
    assert sum(part.seconds for part in found.parts) < 2 * found.seconds
    assert found.share == pytest.approx(found.nbytes / found.seconds / found.read_bandwidth)
    assert 0 < found.active < 1
    before = runner._model.times
    runner.forward([1], runner.init_state())
    assert runner._model.times == before  # nobody watches any more


def test_of_a_compressed_model_the_bytes_are_those_that_are_read(files, tmp_path):
    from rookery.compress import Settings, compress

    settings = Settings(samples=200, clusters=6, embedding_rows=4, least_zeros=0.0, predictor=3, epochs=1, head_steps=1)
    compress(files["rwkv7"], tmp_path / "small.safetensors", settings)
    runner = NativeRunner(tmp_path / "small.safetensors")
    assert {part_of(name) for name in runner.nbytes} == set(ORDER)
    found = profile(runner, steps=2, rounds=1)
    parts = {part.name: part.nbytes for part in found.parts}
    assert parts["channel mix"] < sum(n for name, n in runner.nbytes.items() if part_of(name) == "channel mix")
    assert parts["head"] <= sum(n for name, n in runner.nbytes.items() if part_of(name) == "head")
