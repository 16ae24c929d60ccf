import json

import pytest
import torch

from rookery.adapt.state_tuning import StartState, load_start, save_start
from rookery.models import load


@pytest.fixture
def tuned(model_path, tmp_path):
    """Two small states of the model."""
    model = load(model_path)
    paths = []
    for seed in (1, 2):
        start = StartState(model)
        with torch.no_grad():
            for wkv in start.wkv:
                wkv.copy_(torch.randn(wkv.shape, generator=torch.Generator().manual_seed(seed)))
        paths.append(tmp_path / f"{seed}.safetensors")
        save_start(start, paths[-1], model)
    return paths


@pytest.mark.parametrize("form", [[], ["--features", "32", "--decorrelate", "--lr", "0.1"]], ids=["plain", "kernel"])
def test_tune_trains_a_state_that_generate_takes(cli, model_path, tmp_path, form):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"abc{i}abc"}) for i in range(4)))
    out = tmp_path / "run"
    given = ["-m", model_path, "--out", out, "--steps", 3, "--set", "data.validation_share=0", *form]
    given += ["--set", "data.tokenizer=bytes"]
    code, told, err = cli("state", "tune", tmp_path / "x.jsonl", *given)
    assert code == 0, err
    assert told.strip() == str(out / "state.safetensors")
    start = load_start(out / "state.safetensors", load(model_path))
    assert all(wkv.any() for wkv in start.wkv)
    assert (out / "state.pth").exists() == (not form)
    common = ["-m", model_path, "--tokenizer", "bytes", "-n", 3, "-t", 0, "a", "--state", out / "state.safetensors"]
    code, _, err = cli("generate", *common)
    assert code == (1 if form else 0)
    assert "hosts no kernel-upscaled states; run the model with torch (--device cpu" in err if form else not err
    assert cli("generate", *common, "--device", "cpu")[0] == 0
    code, told, err = cli("state", "eval", out / "state.safetensors", tmp_path / "x.jsonl", "-m", model_path, "--json")
    assert code == 0, err
    found = json.loads(told)
    assert found["with the state"] != found["without the state"]
    more = ["--out", tmp_path / "more", "--from", out / "state.safetensors", "--steps", 1, "--lr", "1e-9"]
    code, _, err = cli("state", "tune", tmp_path / "x.jsonl", *given, *more)
    assert code == 0, err
    again = load_start(tmp_path / "more/state.safetensors", load(model_path))
    torch.testing.assert_close(again.state_dict(), start.state_dict(), rtol=1e-3, atol=1e-4)


def test_eval_prints_both(cli, model_path, tuned, tmp_path):
    (tmp_path / "x.txt").write_text("abcabc")
    code, out, err = cli("state", "eval", tuned[0], tmp_path / "x.txt", "-m", model_path, "--tokenizer", "bytes")
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()] == ["without the state", "with the state"]


def test_compress_and_mix(cli, tuned, tmp_path):
    code, out, _ = cli("state", "compress", tuned[0], "--out", tmp_path / "small.safetensors", "--rank", 2)
    assert code == 0
    assert "% of the squared numbers" in out
    assert cli("state", "mix", *tuned, "--out", tmp_path / "both.safetensors", "--weights", "0.5,0.5")[0] == 0
    assert (tmp_path / "both.safetensors").stat().st_size > (tmp_path / "small.safetensors").stat().st_size


def test_tts_answers_and_keeps_the_state(cli, model_path, tuned, tmp_path):
    common = ["ab", "-m", model_path, "--tokenizer", "bytes", "-n", 3, "--answers", 2, "--steps", 1, "--json"]
    code, out, err = cli("state", "tts", *common, "--mode", "select", "--wanted", "[a-z]")
    assert code == 0, err
    assert len(json.loads(out)["scores"]) == 2
    given = ["--mode", "distil", "--guide-state", tuned[0], "--out", tmp_path / "found.safetensors"]
    code, out, err = cli("state", "tts", *common, *given)
    assert code == 0, err
    assert len(json.loads(out)["losses"]) == 1
    assert any(wkv.any() for wkv in load_start(tmp_path / "found.safetensors", load(model_path)).wkv)
    code, _, err = cli("state", "tts", *common, "--mode", "distil")
    assert code == 2
    assert "--mode distil needs --guide MODEL or --guide-state FILE" in err


def test_an_action_is_needed(cli):
    code, _, err = cli("state")
    assert code == 2
    assert "ACTION" in err
