"""Several processes: it is true that …

One test starts three processes once and does everything in them, because starting is what takes the time.
"""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rookery.models import create_model, load
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train
from rookery.train.parallel import Place, blocks_of, units_of
from rookery.train.tasks.language import language_loss

PROCESS = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import torch, torch.distributed as dist
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
config = overlay(recipe("tiny-test"), json.loads((folder / "config.json").read_text()))
torch.set_num_threads(1)

def phase(name, world, **changes):
    if rank < world:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=world)
        train(replace(config, **changes))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    if rank == 0:
        (folder / name).touch()
    while not (folder / name).exists():
        time.sleep(0.01)

out = str(folder / "resharded")
phase("two", 2, out=out, steps=3)
phase("one", 1, out=out, steps=5, accumulate=2)
phase("three", 3, out=out, steps=8)
phase("shared", 2, out=str(folder / "shared"), steps=4, context_parallel=2)
phase("bfloat16", 2, out=str(folder / "bfloat16"), steps=2, dtype="bfloat16", recompute=True)
"""


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


@pytest.fixture
def config(tmp_path):
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
    (tmp_path / "config.json").write_text(json.dumps(values))
    return overlay(recipe("tiny-test"), {**values, "out": str(tmp_path / "alone")})


def test_any_number_of_processes_takes_the_same_steps(config, tmp_path, caplog):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    commands = [[sys.executable, "-c", PROCESS, str(rank), str(tmp_path)] for rank in range(3)]
    processes = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    train(config)
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(said)

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
    assert losses(tmp_path / "bfloat16") == pytest.approx(alone[:2], abs=0.05)
    assert load(tmp_path / "bfloat16" / "model.safetensors").head.weight.dtype == torch.bfloat16


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
