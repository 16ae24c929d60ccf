"""A run learns, resumes exactly, and survives interruption."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rookery.data.build import build
from rookery.models import create_model, save_model
from rookery.recipes import recipe
from rookery.train.checkpoint import load_checkpoint
from rookery.train.config import overlay, parse_settings
from rookery.train.loop import TrainingFailed, prepare, train

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 60


@pytest.fixture
def config(tmp_path):
    """A run of twelve quick steps."""
    (tmp_path / "text.txt").write_text(TEXT)
    small = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    return overlay(
        recipe("tiny-test"),
        {
            "overrides": small,
            "data": {"path": str(tmp_path / "text.txt"), "sequence_length": 16},
            "out": str(tmp_path / "run"),
            "steps": 12,
            "batch_size": 4,
            "save_every": 4,
            "validate_every": 6,
        },
    )


def rows(config):
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def losses(config):
    return [row["loss"] for row in rows(config)]


def test_the_loss_falls(config):
    config = dataclasses.replace(config, steps=60)
    result = train(config)
    assert result.step == 60
    assert result.signal is None
    assert losses(config)[-1] < losses(config)[0] - 1


def test_every_step_has_its_line(config):
    train(config)
    assert [row["step"] for row in rows(config)] == list(range(1, 13))
    assert {"loss", "lr", "tokens", "tokens_per_second", "grad_norm"} <= rows(config)[0].keys()
    assert rows(config)[-1]["tokens"] == 12 * 4 * 16
    assert [row["step"] for row in rows(config) if "validation_nats_per_character" in row] == [6, 12]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, dtype):
    whole = dataclasses.replace(config, dtype=dtype, out=str(tmp_path / "whole"))
    train(whole)
    cut = dataclasses.replace(config, dtype=dtype, optim=dataclasses.replace(config.optim, schedule="cosine"))
    with pytest.raises(KeyboardInterrupt):
        stop_after(cut, step=7)
    train(cut)
    assert losses(cut) == losses(whole)
    weights = [load_checkpoint(Path(c.out) / "checkpoints")["optimizer"]["masters"] for c in (whole, cut)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def stop_after(config, step):
    """Ends a run in the middle of a step, as a crash would."""
    import rookery.train.tasks.language as task

    original, calls = task.language_loss, []

    def failing(*args):
        calls.append(args)
        if len(calls) > step + 2:  # validation calls come in between
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "language_loss", failing)
        train(config)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(config, caplog):
    train(dataclasses.replace(config, steps=8))
    newest = Path(config.out) / "checkpoints" / "step-00000008.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert load_checkpoint(newest.parent)["step"] == 4
    assert "cannot be read" in caplog.text
    assert train(config).step == 12
    assert [row["step"] for row in rows(config)] == list(range(1, 13))


def test_old_checkpoints_are_removed(config):
    train(config)
    assert sorted(p.name for p in (Path(config.out) / "checkpoints").iterdir()) == [
        "step-00000008.pt",
        "step-00000012.pt",
    ]


def test_a_folder_with_another_run_is_refused(config):
    train(dataclasses.replace(config, steps=4))
    with pytest.raises(TrainingFailed, match=r"other settings \(batch_size\)"):
        train(dataclasses.replace(config, batch_size=5))


def test_the_run_may_be_made_longer(config):
    train(dataclasses.replace(config, steps=4))
    assert train(dataclasses.replace(config, steps=6)).step == 6


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config):
    config = overlay(config, {"optim": {"lr": 1e30, "clip": 1e30, "warmup_steps": 0}, "save_every": 1})
    with pytest.raises(TrainingFailed, match=r"the loss of step \d+ is nan|inf"):
        train(config)
    assert load_checkpoint(Path(config.out) / "checkpoints")["step"] >= 1


def test_a_run_may_start_from_a_model(config, tmp_path):
    train(dataclasses.replace(config, steps=60))
    first = Path(config.out) / "model.safetensors"
    second = dataclasses.replace(config, initial=str(first), steps=1, out=str(tmp_path / "second"))
    train(second)
    assert losses(second)[0] < losses(config)[0] - 1


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(config, tmp_path):
    save_model(create_model("rwkv7-test"), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="knows 64 tokens, the tokenizer 'bytes' has 256"):
        train(dataclasses.replace(config, initial=str(tmp_path / "small.safetensors")))


def test_no_text_is_an_error_that_says_how_to_give_it(config):
    with pytest.raises(ValueError, match=r"--set data\.path"):
        train(overlay(config, {"data": {"path": ""}}))


def test_the_held_out_loss_is_the_mean_over_the_held_out_text(config, tmp_path):
    text = "A held-out text of its own, which the run never learns from. " * 3
    (tmp_path / "held.txt").write_text(text)
    run = prepare(overlay(config, {"data": {"validation": str(tmp_path / "held.txt")}}))
    tokens = torch.tensor([*text.encode(), 0])
    rows = (len(tokens) - 1) // 16
    inputs, targets = tokens[: rows * 16].view(rows, 16), tokens[1 : rows * 16 + 1]
    expected = torch.nn.functional.cross_entropy(run.task.model(inputs)[0].flatten(0, 1), targets).item()
    measured = run.task.validate()
    assert measured["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["validation_nats_per_character"] == pytest.approx(expected * len(tokens) / len(text), rel=1e-5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code_and_the_same_command_continues(config, number, code):
    command = [sys.executable, "-m", "rookery.cli.main", "train", "tiny-test"]
    command += [
        "--set",
        f"data.path={config.data.path}",
        "--set",
        f"out={config.out}",
        "--set",
        "data.sequence_length=16",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([*command, "--set", "steps=100000"], env=environment, stderr=subprocess.PIPE, text=True)
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert process.returncode == code, said
    assert "the same command continues" in said
    done = load_checkpoint(Path(config.out) / "checkpoints")["step"]
    assert rows(config)[-1]["step"] == done
    again = [*command, "--set", f"steps={done + 2}"]
    subprocess.run(again, env=environment, check=True, capture_output=True, timeout=180)
    assert [row["step"] for row in rows(config)] == list(range(1, done + 3))


def test_accumulation_takes_the_same_steps(config, tmp_path):
    train(dataclasses.replace(config, steps=5))
    parts = dataclasses.replace(config, steps=5, accumulate=4, out=str(tmp_path / "parts"))
    train(parts)
    assert losses(parts) == pytest.approx(losses(config), abs=2e-4)


def test_rows_that_cannot_be_divided_are_refused(config):
    with pytest.raises(ValueError, match="batch_size=4 rows cannot be divided among 3"):
        train(dataclasses.replace(config, accumulate=3))


@pytest.mark.parametrize("changes", [{"recompute": True}, {"compile": "eager"}], ids=["recompute", "compile"])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_recomputation_and_compilation_change_nothing(config, tmp_path, changes):
    train(dataclasses.replace(config, steps=2))
    other = dataclasses.replace(config, steps=2, out=str(tmp_path / "other"), **changes)
    train(other)
    assert losses(other) == pytest.approx(losses(config), abs=1e-5)


def failing_losses(monkeypatch, at):
    """Makes the loss of the steps `at` infinite."""
    import rookery.train.tasks.language as task

    original = task.LanguageTask.batch
    seen = []

    def batch(self, step):
        seen.append(step)
        return original(self, step)

    def loss(model, inputs, targets, l2wrap=0.0):
        found = language_loss(model, inputs, targets, l2wrap)
        return found * math.inf if seen[-1] in at else found

    language_loss = task.language_loss
    monkeypatch.setattr(task.LanguageTask, "batch", batch)
    monkeypatch.setattr(task, "language_loss", loss)


def test_a_step_without_a_finite_loss_is_skipped_and_said(config, monkeypatch, capsys):
    failing_losses(monkeypatch, {3, 4, 7})
    config = dataclasses.replace(config, bad_steps=3, validate_every=0)
    assert train(config).step == 12
    assert [row["step"] for row in rows(config) if row.get("skipped")] == [3, 4, 7]
    assert rows(config)[2]["loss"] is None
    assert losses(config)[-1] < losses(config)[0]
    assert "step 3: the loss or the gradient is not finite; skipped" in capsys.readouterr().err


def test_too_many_bad_steps_in_a_row_stop_the_run_also_across_a_resume(config, monkeypatch):
    failing_losses(monkeypatch, {3, 4, 5})
    config = dataclasses.replace(config, bad_steps=3, save_every=1)
    train(dataclasses.replace(config, steps=4))
    with pytest.raises(TrainingFailed, match="the loss of step 5 is inf.*the last checkpoint is of step 4"):
        train(config)


FULL = """
import resource, sys
from rookery.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.exit(main(sys.argv[1:]))
"""


def command_line(config, *settings):
    given = [f"data.path={config.data.path}", f"out={config.out}", "data.sequence_length=16", "batch_size=4", *settings]
    return ["train", "tiny-test", *(word for setting in given for word in ("--set", setting))]


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_what_was_there(config):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, *command_line(config, "save_every=2")],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rookery: step 2 could not be saved" in done.stderr
    assert "File too large" in done.stderr
    assert "there is no checkpoint before it" in done.stderr
    assert not list((Path(config.out) / "checkpoints").iterdir())


def test_a_killed_run_continues_as_if_nothing_had_happened(config, tmp_path):
    config = dataclasses.replace(config, out=str(tmp_path / "killed"))
    command = [sys.executable, "-m", "rookery.cli.main", *command_line(config, "save_every=1", "validate_every=0")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([*command, "--set", "steps=100000"], env=environment, stderr=subprocess.DEVNULL)
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (Path(config.out) / "checkpoints" / ".step-00000009.pt.x.part").touch()  # as if killed while saving
    reached = load_checkpoint(Path(config.out) / "checkpoints")["step"]
    settings = parse_settings([w for w in command if "=" in w])
    again = overlay(recipe("tiny-test"), {**settings, "steps": reached + 3, "optim": {"schedule": "wsd"}})
    with pytest.raises(TrainingFailed, match="optim"):
        train(again)
    again = overlay(recipe("tiny-test"), {**settings, "steps": reached + 3})
    train(again)
    assert [row["step"] for row in rows(again)] == list(range(1, reached + 4))
    assert not list((Path(config.out) / "checkpoints").glob(".*"))


def test_tokens_and_documents_and_mixtures_train_as_well(config, tmp_path):
    lines = [{"text": TEXT[i : i + 40 + i % 30]} for i in range(0, 3000, 50)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build([str(tmp_path / "lines.jsonl")], str(tmp_path / "tokens"), "bytes")
    changes = [
        {"path": str(tmp_path / "tokens.bin"), "order": "official"},
        {"path": str(tmp_path / "tokens.bin"), "order": "documents"},
        {"path": f"{tmp_path / 'tokens'},{config.data.path}", "weights": "0.9,0.1"},
    ]
    for i, change in enumerate(changes):
        run = overlay(config, {"data": change, "out": str(tmp_path / f"run{i}"), "steps": 30, "accumulate": 2})
        train(run)
        assert losses(run)[-1] < losses(run)[0] - 0.3
        assert "validation_loss" in rows(run)[-1]


def test_documents_in_parts_take_the_same_steps(config, tmp_path):
    (tmp_path / "lines.json").write_text(json.dumps([TEXT[i : i + 30] for i in range(0, 900, 30)]))
    config = overlay(config, {"data": {"path": str(tmp_path / "lines.json"), "order": "documents"}, "steps": 4})
    train(config)
    parts = dataclasses.replace(config, accumulate=3, out=str(tmp_path / "parts"))
    train(parts)
    assert losses(parts) == pytest.approx(losses(config), abs=2e-4)


def test_tokens_of_another_vocabulary_are_refused(config, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([TEXT, TEXT]))
    build([str(tmp_path / "a.json")], str(tmp_path / "tokens"), "world")
    with pytest.raises(ValueError, match="the tokenizer has 256"):
        train(overlay(config, {"data": {"path": str(tmp_path / "tokens.bin")}}))


def test_weights_that_are_no_numbers_are_refused(config):
    with pytest.raises(ValueError, match="must be numbers"):
        train(overlay(config, {"data": {"weights": "many"}}))


def test_a_finished_model_has_a_card(config):
    train(dataclasses.replace(config, steps=4, validate_every=4))
    card = (Path(config.out) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: rookery\n")
    assert "| validation loss |" in card
    assert "| tokens | 256 |" in card
    assert "optim.lr = 0.004" in card
