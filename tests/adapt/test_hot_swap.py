"""Adapters swapped from request to request do what merged ones do."""

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.adapt.hot_swap import HotSwap
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import adapted, read_adapter
from rookery.checkpoints.convert import convert
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.scheduler import Scheduler
from rookery.errors import BadCheckpoint
from rookery.models import load, save_model

KEY, DOWN = "blocks.1.att.key", "blocks.2.ffn.value"  # [32, 32] and [32, 96]
SHAPES = {KEY: (32, 32), DOWN: (32, 96)}
RNG = np.random.default_rng(3)
TOKENS = [3, 1, 4, 1, 5, 9]


def numbers(*shape, scale=1.0):
    return torch.tensor(scale * RNG.normal(size=shape), dtype=torch.float32)


def pair(prefix=""):
    sizes = {"A": lambda s: (4, s[1]), "B": lambda s: (s[0], 4)}
    return {f"{m}.{prefix}lora_{x}": numbers(*sizes[x](s), scale=0.3) for m, s in SHAPES.items() for x in "AB"}


KINDS = {
    "lora": pair,
    "pissa": lambda: pair() | pair("init_"),
    "dora": lambda: pair() | {f"{m}.lora_magnitude_vector": numbers(32) for m in SHAPES},
    "miss": lambda: {f"{m}.disha": numbers(5, 32) for m in SHAPES},
    "mini": lambda: {f"{m}.miss_block": numbers(5, 8) for m in SHAPES},
    "old bone": lambda: {f"{DOWN}.bone": numbers(32, 5)},
    "bat by columns": lambda: {f"{m}.disha": numbers(s[1] // 8, 8, 8, scale=0.1) for m, s in SHAPES.items()},
    "bone ab": lambda: {f"{m}.bone_{x}": numbers(s[1] // 8, 8, 8, scale=0.1) for m, s in SHAPES.items() for x in "AB"},
    "bat by rows": lambda: {f"{m}.bone": numbers(s[0] // 8, 8, 8, scale=0.1) for m, s in SHAPES.items()},
}


@pytest.fixture
def base(tmp_path):
    save_model(tiny(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_adapter_computes_what_the_merged_one_does(tmp_path, base, kind):
    torch.save(KINDS[kind](), tmp_path / "a.pth")
    swap, adapter = HotSwap(load(base)), read_adapter(tmp_path / "a.pth", alpha=2)
    merged = load(adapted(open_checkpoint(base), tmp_path / "a.pth", alpha=2))
    with torch.no_grad():
        expected = merged(torch.tensor([TOKENS]))[0]
        plain = load(base)(torch.tensor([TOKENS]))[0]
        assert not torch.allclose(plain, expected, atol=1e-2)
        with swap.using(swap.changes(adapter)) as model:
            torch.testing.assert_close(model(torch.tensor([TOKENS]))[0], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(swap.model(torch.tensor([TOKENS]))[0], plain)  # the base is as it was
    assert TorchRunner(load(base)).adapted(adapter).fingerprint() == merged.fingerprint()


def test_requests_take_turns_each_with_its_own(tmp_path, base):
    for name in ("lora", "miss"):
        torch.save(KINDS[name](), tmp_path / f"{name}.pth")
    files = {name: tmp_path / f"{name}.pth" for name in ("lora", "miss")}
    llm = LLM(base, device="cpu", adapters=files, adapter_alpha=2)
    alone = {}
    for name in files:
        convert(adapted(open_checkpoint(base), tmp_path / f"{name}.pth", alpha=2), tmp_path / f"{name}.safetensors")
        alone[name] = LLM(tmp_path / f"{name}.safetensors", device="cpu")
    alone[None] = LLM(base, device="cpu")
    sessions = {name: llm.session(adapter=name) for name in alone}
    written = {name: [] for name in alone}
    for session in sessions.values():
        session.feed(TOKENS)
    for _ in range(8):  # one token of each in turn, on one base
        for name, session in sessions.items():
            written[name] += list(session.stream_tokens(1, 0, ignore_eos=True))
    for name, one in alone.items():
        session = one.session()
        session.feed(TOKENS)
        assert list(session.stream_tokens(8, 0, ignore_eos=True)) == written[name], name
    sessions["lora"].save(tmp_path / "s.safetensors")
    assert alone["lora"].session(tmp_path / "s.safetensors").tokens_seen == sessions["lora"].tokens_seen
    first, second = (llm.adapters[n].logits(TOKENS) for n in ("lora", "miss"))
    assert np.abs(first - second).max() > 1e-2
    scheduler, how = Scheduler(llm), {"tokens": True, "temperature": 0, "ignore_eos": True}
    batch = {name: scheduler.submit(TOKENS, 8, llm=one, **how) for name, one in (llm.adapters | {None: llm}).items()}
    assert {name: list(text) for name, text in batch.items()} == written  # in one batch, too


def test_what_does_not_fit_is_refused(tmp_path, base):
    runner = TorchRunner(load(base))

    def refused(tensors, message, **how):
        torch.save(tensors, tmp_path / "x.pth")
        with pytest.raises(BadCheckpoint, match=message):
            runner.adapted(read_adapter(tmp_path / "x.pth", **how))

    refused({"blocks.7.att.key.disha": numbers(4, 32)}, "this rwkv7 model has no matrix 'blocks.7.att.key'")
    refused({f"{KEY}.disha": numbers(4, 48)}, "blocks.1.att.key: a factor 4 × 48 shares no rows")
    refused(pair() | {"blocks.0.ln1.weight": numbers(32)}, "trained whole, which cannot be swapped", alpha=1)
