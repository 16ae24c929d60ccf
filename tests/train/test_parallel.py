"""Several processes: it is true that …

Each test starts its processes once and does everything in them, because starting is what takes the time.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from support.language import randomised
from torch.utils.checkpoint import checkpoint

from rookery.models import create_model, load, save_model
from rookery.recipes import recipe
from rookery.train.checkpoint import CannotSave, save_by_first
from rookery.train.config import overlay
from rookery.train.loop import train
from rookery.train.parallel import Place, blocks_of, units_of
from rookery.train.tasks.language import language_loss

PROCESS = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
for i, (name, world, values) in enumerate(json.loads((folder / "phases.json").read_text())):
    done = folder / f"{i}.done"
    if rank < world:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{i}.store", rank=rank, world_size=world)
        train(overlay(recipe(name), values))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    if rank == 0:
        done.touch()
    while not done.exists():
        time.sleep(0.01)
"""


@contextmanager
def processes(folder, phases):
    """Processes that go through `phases`, (recipe, processes, settings) each; all is done when the block is left."""
    (folder / "phases.json").write_text(json.dumps(phases))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    commands = [[sys.executable, "-c", PROCESS, str(rank), str(folder)] for rank in range(max(p[1] for p in phases))]
    with (folder / "said").open("w") as said:
        started = [subprocess.Popen(command, env=environment, stderr=said) for command in commands]
    try:
        yield
        until = time.monotonic() + 300
        # the others would wait for one that fails
        while not any(process.poll() for process in started) and any(process.poll() is None for process in started):
            assert time.monotonic() < until, (folder / "said").read_text()
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * len(started), (folder / "said").read_text()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


@pytest.fixture
def values(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60)
    values = {
        "overrides": {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2},
        "data": {"path": str(tmp_path / "text.txt"), "sequence_length": 16},
        "steps": 8,
        "batch_size": 6,
        "save_every": 4,
        "validate_every": 4,
        "device": "cpu",
    }
    return values


def test_any_number_of_processes_takes_the_same_steps(values, tmp_path, caplog):
    config = overlay(recipe("tiny-test"), {**values, "out": str(tmp_path / "alone")})
    out = {**values, "out": str(tmp_path / "resharded")}
    averaged = {"optim": {"ema": 0.5}, "steps": 6, "validate_every": 2}
    phases = [
        (2, {**out, "steps": 3}),
        (1, {**out, "steps": 5, "accumulate": 2}),
        (3, {**out, "steps": 8}),
        (2, {**values, "out": str(tmp_path / "shared"), "steps": 4, "context_parallel": 2}),
        (2, {**values, "out": str(tmp_path / "bfloat16"), "steps": 2, "dtype": "bfloat16", "recompute": True}),
        (2, {**values, "out": str(tmp_path / "averaged"), **averaged}),
    ]
    with processes(tmp_path, [("tiny-test", *phase) for phase in phases]):
        train(config)
        train(overlay(config, {"out": str(tmp_path / "averaged-alone"), **averaged}))

    alone = losses(Path(config.out))
    # 2 processes, then 1 from their pieces, then 3 from its file
    resharded = tmp_path / "resharded"
    assert losses(resharded) == pytest.approx(alone, abs=2e-5)
    assert sorted(p.name for p in (resharded / "checkpoints").iterdir()) == ["step-00000005.pt", "step-00000008"]
    weights = [load(folder / "model.safetensors").state_dict() for folder in (Path(config.out), resharded)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert [row.get("validation_loss") for row in rows(resharded)][-1] == pytest.approx(
        rows(Path(config.out))[-1]["validation_loss"], abs=1e-4
    )
    # the pieces of the last checkpoint are damaged: one process goes on from the file before
    piece = next((resharded / "checkpoints" / "step-00000008").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-100])
    assert train(dataclasses.replace(config, out=str(resharded))).step == 8
    assert "step-00000008 cannot be read" in caplog.text
    assert losses(resharded) == pytest.approx(alone, abs=2e-5)
    # each row shared by two processes; the first steps are of one and the same schedule but for its length
    four = dataclasses.replace(config, steps=4, out=str(tmp_path / "four"))
    train(four)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "four"), abs=2e-5)
    assert rows(tmp_path / "shared")[-1]["validation_loss"] == pytest.approx(
        rows(tmp_path / "four")[-1]["validation_loss"], abs=1e-4
    )
    # what is judged is an average of the weights, and what goes on learning is not
    for name in ("loss", "validation_loss"):
        found, wanted = ([row.get(name) for row in rows(tmp_path / f"averaged{of}")] for of in ("", "-alone"))
        assert found == pytest.approx(wanted, abs=1e-4), name
    assert losses(tmp_path / "bfloat16") == pytest.approx(alone[:2], abs=0.05)
    assert load(tmp_path / "bfloat16" / "model.safetensors").head.weight.dtype == torch.bfloat16


def test_what_learns_beside_a_model_takes_the_same_steps_on_several_processes(values, tmp_path):
    pytest.importorskip("peft")
    chats = [{"prompt": f"{a}+{b}?", "response": str(a + b) * (1 + a)} for a in range(4) for b in range(4)]
    pairs = [{"prompt": f"{a}?", "chosen": "yes" * (1 + a % 3), "rejected": "no"} for a in range(7)]
    for name, records in (("chats", chats), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = randomised("rwkv7-test", dtype=torch.float32, vocab_size=256)
    save_model(base, tmp_path / "base.safetensors")
    shared = {"base": str(tmp_path / "base.safetensors"), "steps": 4, "save_every": 2, "validate_every": 4}
    # Adam's first steps are as large where a gradient is only rounding: an epsilon keeps them alike
    shared |= {"device": "cpu", "optim": {"lr": 1e-2, "final_lr": 1e-3, "eps": 1e-4}}
    sft, preferred = (
        {"path": str(tmp_path / f"{name}.jsonl"), "sequence_length": 48, "validation_share": 0.1}
        for name in ("chats", "pairs")
    )
    runs = {
        "lora": {"data": sft, "adapt": {"rank": 4, "base": "int4"}, "merge": True},
        "pissa": {"data": sft, "adapt": {"method": "pissa", "rank": 4}},
        "state": {"data": sft, "adapt": {"method": "state"}, "dtype": "bfloat16"},
        "dpo": {"data": preferred, "learn": "dpo", "batch_size": 2, "preference": {"beta": 1.0}},
        "orpo": {"data": preferred, "learn": "orpo", "batch_size": 3},
        "full": {"data": preferred, "learn": "dpo", "adapt": {"method": "full"}},
    }
    only = {**values, "steps": 4, "initial": shared["base"], "train_only": "blocks.*.att.*", "overrides": {}}
    only |= {"optim": {"eps": 1e-4}}

    def phases(of, world, **more):
        named = [
            ("lora", {**shared, **settings, **more, "out": str(tmp_path / of / n)}) for n, settings in runs.items()
        ]
        named.append(("tiny-test", {**only, **more, "out": str(tmp_path / of / "only")}))
        return [(name, world, settings) for name, settings in named]

    with processes(tmp_path, [*phases("two", 2, steps=2), *phases("two", 2)]):  # interrupted after two steps
        for name, _, settings in phases("one", 1):
            train(overlay(recipe(name), settings))
    for name in (*runs, "only"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        near = 2e-2 if name == "state" else 1e-4  # the state's model has bfloat16
        assert losses(two) == pytest.approx(losses(one), rel=near, abs=near), name
        last = [{key: value for key, value in rows(at)[-1].items() if "validation" in key} for at in (one, two)]
        assert last[1] == pytest.approx(last[0], rel=near, abs=near), name
        assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir()), name
        found = sorted(p.suffix for p in (two / "checkpoints").iterdir())
        assert found == (["", ""] if name == "full" else [".pt", ".pt"]), name
    weights = [load(tmp_path / of / "lora" / "model.safetensors").state_dict() for of in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_disk_that_is_full_stops_all_processes(monkeypatch, tmp_path):
    def full(*_):
        raise CannotSave("no room")

    told = []
    monkeypatch.setattr("rookery.train.checkpoint.save_checkpoint", full)
    monkeypatch.setattr("rookery.train.checkpoint.dist.broadcast_object_list", told.append)
    monkeypatch.setattr("rookery.train.checkpoint.dist.get_rank", lambda: 0)
    with pytest.raises(CannotSave, match="no room"):
        save_by_first(tmp_path, 1, {}, 2)
    assert told == [["no room"]]
    monkeypatch.setattr("rookery.train.checkpoint.dist.get_rank", lambda: 1)
    monkeypatch.setattr(
        "rookery.train.checkpoint.dist.broadcast_object_list", lambda reason: reason.insert(0, "no room")
    )
    with pytest.raises(CannotSave, match="no room"):
        save_by_first(tmp_path, 1, {}, 2)


def test_processes_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="context_parallel=2 does not divide the 1 processes"):
        Place.here(context=2)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="cannot be cut into pieces"):
        blocks_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["rwkv7b-test", "rwkv6-test", "rwkv4-test", "arwkv-test", "transformer-test"])
def test_the_mixers_of_every_family_are_found_and_can_be_computed_again(name):
    model = create_model(name)
    rows = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        loss = language_loss(model, rows[:, :-1], rows[:, 1:])
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    units = units_of(model)
    assert len(units) >= 2 * model.config.num_hidden_layers
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    for found, wanted in zip(gradients(), expected):
        torch.testing.assert_close(found, wanted)
