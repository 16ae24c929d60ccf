"""Training on an NVIDIA GPU: it is true that …"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.training import assert_resumes_exactly

from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import one_step, prepare, train
from rookery.train.tasks.language import LanguageTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60)
    data = {"path": str(tmp_path / "text.txt"), "sequence_length": 64}
    settings = {"data": data, "steps": 8, "save_every": 4, "validate_every": 4, "out": str(tmp_path / "run")}
    return overlay(recipe("tiny-test"), {**settings, "device": "cuda", "optim": {"eps": 1e-8}})


def rows(config):
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"recompute": True}, {"compile": "inductor"}, {"accumulate": 2}],
    ids=["float32", "bfloat16", "recompute", "compile", "accumulate"],
)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_it_takes_the_steps_that_a_cpu_takes(config, tmp_path, changes):
    train(overlay(config, changes))
    on_cpu = overlay(config, {"device": "cpu", "out": str(tmp_path / "cpu")})
    train(on_cpu)
    near = 0.1 if "dtype" in changes else 1e-2  # products of float32 may be rounded to TF32
    assert [row["loss"] for row in rows(config)] == pytest.approx([row["loss"] for row in rows(on_cpu)], abs=near)


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    whole = overlay(config, {"out": config.out + "-whole"})
    train(whole)

    class Counting(LanguageTask):
        """Counts its steps, for `assert_resumes_exactly`."""

    Counting.batch = lambda self, step: setattr(self, "step", step) or LanguageTask.batch(self, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rookery.train.tasks.language.LanguageTask", Counting)
        assert_resumes_exactly(whole, config, Counting, step=6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_waits_for_the_gpu_once(config, tmp_path, dtype):
    run = prepare(overlay(config, {"dtype": dtype, "accumulate": 2}))
    for _ in range(2):
        one_step(run, tmp_path)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            one_step(run, tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == 1, [str(w.message) for w in waits]


@pytest.mark.parametrize(
    "settings", [[], ["--set", "context_parallel=2"], ["--set", "dtype=bfloat16"]], ids=["plain", "context", "bfloat16"]
)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_take_the_steps_that_one_takes(config, tmp_path, settings):
    train(config)
    two = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rookery.cli.main"]
    command += ["train", "tiny-test", "--set", f"out={two}", "--set", f"data.path={config.data.path}", *settings]
    for key in ("steps", "save_every", "validate_every"):
        command += ["--set", f"{key}={getattr(config, key)}"]
    subprocess.run([*command, "--set", "data.sequence_length=64", "--set", "optim.eps=1e-8"], check=True)
    losses = [json.loads(line)["loss"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    near = 0.1 if "dtype=bfloat16" in settings else 1e-2
    assert losses == pytest.approx([row["loss"] for row in rows(config)], abs=near)
