"""Adapters beside a model's weights on the compiled runtime: what merged ones compute, each row with its own."""

import gc
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.language import randomise

from rookery import _native
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import adapted, read_adapter
from rookery.engine.llm import LLM
from rookery.engine.runners.native import NativeRunner
from rookery.engine.scheduler import Scheduler
from rookery.engine.state_cache import StateCache
from rookery.errors import BackendUnavailable, BadCheckpoint, BadState, UnknownName
from rookery.models import create_model, save_model

FAMILIES = ("rwkv4", "rwkv5", "rwkv6", "rwkv6-a", "rwkv7")
SIZES = {"hidden_size": 80, "num_hidden_layers": 3, "intermediate_size": 201, "vocab_size": 256}
TOKENS = np.random.default_rng(4).integers(1, 256, size=37).tolist()
KEY, DOWN = "blocks.1.att.key", "blocks.2.ffn.value"
RANK = 5


def model_of(family, **overrides):
    heads = {} if family == "rwkv4" else {"head_dim": 16 if family == "rwkv7" else 40}
    return randomise(create_model(f"{family}-test", **SIZES | heads | overrides))


def matrices(model):
    """Shapes of all that an adapter may change: attention, channel mix, gates, the head."""
    found = {name: layer.weight.shape for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert "head" in found
    return found


def numbers(rng, *shape, size=0.2):
    return torch.tensor(size * rng.normal(size=shape), dtype=torch.float32)


def lora(shapes, seed=1, rank=RANK):
    rng = np.random.default_rng(seed)
    factors = {}
    for name, (out, into) in shapes.items():
        factors |= {f"{name}.lora_A": numbers(rng, rank, into), f"{name}.lora_B": numbers(rng, out, rank)}
    return factors


def adapter_of(folder, name, tensors, alpha=2 * RANK):
    torch.save(tensors, folder / f"{name}.pth")
    return read_adapter(folder / f"{name}.pth", alpha=alpha)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, and three adapters of it under the names a, b and c."""
    folder = tmp_path_factory.mktemp("base")
    model = model_of("rwkv7")
    save_model(model, folder / "base.safetensors")
    shapes = matrices(model)
    some = {name: shape for name, shape in shapes.items() if "ffn" in name}
    for name, tensors in {"a": lora(shapes), "b": lora(shapes, 2, 17), "c": lora(some, 3)}.items():
        torch.save(tensors, folder / f"{name}.pth")
    return folder / "base.safetensors"


def files(base, *names):
    return {name: base.with_name(f"{name}.pth") for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_family_can_be_changed(tmp_path, family):
    model = model_of(family)
    save_model(model, tmp_path / "base.safetensors")
    adapter = adapter_of(tmp_path, "a", lora(matrices(model)))
    runner = NativeRunner(tmp_path / "base.safetensors")
    merged = NativeRunner(adapted(open_checkpoint(tmp_path / "base.safetensors"), adapter))
    other = runner.adapted(adapter)
    torch_runner = LLM(tmp_path / "base.safetensors", device="cpu").runner.adapted(adapter)
    plain = runner.forward(TOKENS, runner.init_state(), "all")
    for one in (merged, torch_runner):
        expected = one.forward(TOKENS, one.init_state(), "all")
        found = other.forward(TOKENS, other.init_state(), "all")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
    assert np.abs(found - plain).max() > 0.1
    assert other.fingerprint() == merged.fingerprint() != runner.fingerprint()
    assert (runner.forward(TOKENS, runner.init_state(), "all") == plain).all()  # the base is as it was


def peft_folder(folder, tensors, **settings):
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    return folder


def form(kind, shapes, folder):
    rng = np.random.default_rng(9)
    shapes = {name: shapes[name] for name in (KEY, DOWN)}
    if kind == "rslora":
        return peft_folder(folder / "peft", lora(shapes), lora_alpha=4, use_rslora=True, r=RANK)
    if kind == "pissa":
        tensors = lora(shapes) | {
            f"{n.rpartition('.')[0]}.init_{n.rpartition('.')[2]}": t for n, t in lora(shapes, 8).items()
        }
    elif kind == "miss":
        tensors = {f"{name}.disha": numbers(rng, 7, out) for name, (out, _) in shapes.items()}
    elif kind == "mini":
        tensors = {f"{name}.miss_block": numbers(rng, 7, 16) for name in shapes}
    torch.save(tensors, folder / f"{kind}.pth")
    return folder / f"{kind}.pth"


@pytest.mark.parametrize("kind", ["rslora", "pissa", "miss", "mini"])
def test_forms_that_are_low_rank_are_swapped_as_such(tmp_path, base, kind):
    file = form(kind, matrices(model_of("rwkv7")), tmp_path)
    found, expected = (LLM(base).adapted(file).logits(TOKENS), LLM(base, adapter=file).logits(TOKENS))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
    assert np.abs(found - LLM(base).logits(TOKENS)).max() > 0.05


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_a_row_among_others_is_what_it_is_alone(base, isa, how):
    runner = NativeRunner(base, isa=isa, threads=3, **how)
    ways = [runner, *(runner.adapted(read_adapter(file, alpha=4)) for file in files(base, "a", "b", "c").values())]
    lengths = [1, 19, 1, 3, 1, 1, 2, 9]
    rows = [TOKENS[i : i + n] for i, n in enumerate(lengths)]
    states = [ways[i % 4].init_state() for i in range(8)]
    found = runner.forward_rows(rows, states, ["all", "last", "none", 2, "last", "last", "all", "last"])
    again = ways[2].forward_rows([[5]] * 8, states, ["last"] * 8)  # whichever runner is asked
    alone = NativeRunner(base, isa=isa, threads=1, **how)
    ways = [alone, *(alone.adapted(read_adapter(file, alpha=4)) for file in files(base, "a", "b", "c").values())]
    for i, row in enumerate(rows):
        state = ways[i % 4].init_state()
        logits = ways[i % 4].forward(row, state, "all")
        assert (found[i] == logits[len(row) - len(found[i]) :]).all(), i
        assert (again[i] == ways[i % 4].forward([5], state)).all(), i
        assert (states[i].numbers == state.numbers).all(), i
        cut = ways[i % 4].init_state()  # token by token
        assert all((ways[i % 4].forward([token], cut)[0] == one).all() for token, one in zip(row, logits)), i
    assert len({row[-1].tobytes() for row in again}) == 8


def test_speculation_and_beams_keep_to_the_adapter(base):
    llm = LLM(base, adapters=files(base, "a"), adapter_alpha=4)
    merged = LLM(base, adapter=files(base, "a")["a"], adapter_alpha=4)
    one = llm.adapters["a"]
    texts = [list(way.session().fork().llm.runner.forward(TOKENS, way.fresh_state())[0][:3]) for way in (one, merged)]
    np.testing.assert_allclose(*texts, rtol=1e-3, atol=2e-3)

    def written(way, **how):
        session = way.session()
        session.feed(TOKENS)
        return list(session.stream_tokens(12, 0, ignore_eos=True, **how))

    assert written(one, speculate=3) == written(one) == written(merged)
    first, second = (way.beam_search(TOKENS, 3, 6) for way in (one, merged))
    assert [beam.tokens for beam in first] == [beam.tokens for beam in second]


def test_texts_of_one_batch_have_their_own_adapters(base):
    llm = LLM(base, adapters=files(base, "a", "b"), adapter_alpha=4)
    names = ["a", None, "b", "a"]
    prompts = [TOKENS[:20], TOKENS[:20], TOKENS[:20], TOKENS[:19]]
    options = {"temperature": 0.7, "seed": 3, "ignore_eos": True}
    together = llm.generate(prompts, 10, adapter=names, **options)
    assert together == [llm.generate(prompt, 10, adapter=name, **options) for prompt, name in zip(prompts, names)]
    assert len({*together}) == 4
    assert llm.generate(prompts, 10, adapter="b", **options)[2] == together[2]
    with pytest.raises(ValueError, match="2 adapters for 4 prompts"):
        llm.generate(prompts, adapter=["a", "b"])
    with pytest.raises(UnknownName, match=r"no adapter named 'aa'\. Did you mean 'a'"):
        llm.generate(prompts[0], adapter="aa")


def test_prefixes_of_one_adapter_are_not_anothers(base):
    llm = LLM(base, adapters=files(base, "a", "b"), adapter_alpha=4)
    a, b = llm.adapters["a"], llm.adapters["b"]
    llm.cache, a.cache = StateCache(), StateCache()
    scheduler = Scheduler(llm)
    how = {"tokens": True, "temperature": 0, "ignore_eos": True}
    for llm_of in (llm, a, llm, a):
        last = scheduler.submit(TOKENS, 6, llm=llm_of, **how)
        assert list(last) == list(Scheduler(llm_of).submit(TOKENS, 6, **how))
    assert last.cached > 0
    with pytest.raises(BadState, match="the states of another model"):
        scheduler.submit(TOKENS, 6, llm=b, cache=a.cache, **how)
    other = LLM(base)
    with pytest.raises(ValueError, match="runs another model"):
        scheduler.submit(TOKENS, llm=other)


def test_an_adapter_may_go_while_texts_are_written_with_it(base):
    llm = LLM(base, adapters=files(base, "a"), adapter_alpha=4)
    expected = list(Scheduler(llm.adapters["a"]).submit(TOKENS, 12, tokens=True, temperature=0, ignore_eos=True))
    with Scheduler(llm) as scheduler:
        text = scheduler.submit(TOKENS, 12, llm=llm.adapters["a"], tokens=True, temperature=0, ignore_eos=True)
        begun = [next(text)]
        native = weakref.ref(llm.adapters["a"].runner)
        del llm.adapters["a"]
        llm.adapters["a"] = llm.adapted(files(base, "b")["b"], alpha=4)  # another one under its name
        begun += list(text)
    assert begun == expected
    assert llm.generate(TOKENS, 12, adapter="a", temperature=0) is not None
    del text
    gc.collect()
    assert native() is None  # nothing holds what was forgotten


def test_a_kept_state_belongs_to_its_adapter(tmp_path, base):
    llm = LLM(base, adapters=files(base, "a", "b"), adapter_alpha=4)
    session = llm.session(adapter="a")
    session.feed(TOKENS)
    session.save(tmp_path / "a.state")
    for name in (None, "b"):
        with pytest.raises(BadState, match="another model"):
            llm.session(tmp_path / "a.state", adapter=name)
    back = llm.session(tmp_path / "a.state", adapter="a")
    assert list(back.stream_tokens(6, 0)) == list(session.stream_tokens(6, 0))
    merged = LLM(base, adapter=files(base, "a")["a"], adapter_alpha=4)
    assert merged.session(tmp_path / "a.state").tokens_seen == len(TOKENS)


def test_what_cannot_be_swapped_is_refused(tmp_path, base):
    runner = NativeRunner(base)
    rng = np.random.default_rng(2)

    def refused(tensors, message, error=BadCheckpoint, alpha=1):
        with pytest.raises(error, match=message):
            runner.adapted(adapter_of(tmp_path, "x", tensors, alpha))

    refused(lora({"blocks.7.att.key": (80, 80)}), "this rwkv7 model has no matrix 'blocks.7.att.key'")
    refused(lora({KEY: (80, 64)}), "blocks.1.att.key: lora_A 5 × 64 does not fit a weight 80 × 80")
    refused(lora({KEY: (64, 80)}), "lora_B 64 × 5 does not fit a weight 80 × 80")
    refused({f"{KEY}.lora_A": numbers(rng, 5, 80)}, "lora_A without lora_B")
    refused(lora({KEY: (80, 80)}), "does not say the alpha", alpha=None)
    refused(lora({KEY: (80, 80)}) | {"blocks.0.ln1.weight": numbers(rng, 80)}, "trained whole, which cannot be swapped")
    refused({f"{KEY}.disha": numbers(rng, 7, 64)}, "shares no rows with a weight 80 × 80")
    magnitude = {f"{KEY}.lora_magnitude_vector": numbers(rng, 80)}
    refused(lora({KEY: (80, 80)}) | magnitude, "DoRA changes the weights .*swap it with torch", BackendUnavailable)
    refused({f"{KEY}.disha": numbers(rng, 10, 8, 8)}, "BAT changes the weights", BackendUnavailable)
    factors = {f"{KEY}.weight": (np.zeros((2, 80), np.float32), np.zeros((3, 80), np.float32))}
    with pytest.raises(ValueError, match="differ in their rank"):
        _native.Adapter(runner._model, factors)
    with pytest.raises(ValueError, match="has no matrix 'x' that these factors fit"):
        _native.Adapter(runner._model, {"x": factors[f"{KEY}.weight"][:1] * 2})
    state = NativeRunner(base).adapted(read_adapter(files(base, "a")["a"], alpha=1)).init_state()
    with pytest.raises(ValueError, match="made for another model"):
        runner.forward([1], state)


def test_torch_is_not_needed(tmp_path, base):
    folder = peft_folder(tmp_path / "peft", lora({KEY: (80, 80)}), lora_alpha=4, r=RANK)
    code = f"""
import sys
from rookery.engine.llm import LLM
llm = LLM({str(base)!r}, adapters={{"a": {str(folder)!r}, "b": {str(files(base, "a")["a"])!r}}}, adapter_alpha=3)
print(llm.generate([[1, 2]] * 2, 3, adapter=["a", "b"], ignore_eos=True) is not None, "torch" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["True", "False"]
