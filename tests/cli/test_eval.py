import json

import pytest
import torch

from rookery.adapt.config import AdaptConfig
from rookery.adapt.peft import adapter_tensors, attach, merge, save_adapter
from rookery.checkpoints.tuned_state import save_tuned_state
from rookery.models import load, save_model

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_is_told_as_json(cli, model_path, text):
    code, out, err = cli("eval", "perplexity", text, "--model", model_path, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["bytes"] == found["tokens"] == len(TEXT)
    assert found["bits_per_byte"] > 0
    window = ("--mode", "sliding", "--window", 64, "--stride", 32)
    sliding = cli("eval", "perplexity", text, "--model", model_path, "--json", *window)
    assert json.loads(sliding[1])["bits_per_byte"] != found["bits_per_byte"]


def test_the_embedded_model_is_measured_without_naming_one(cli, text):
    code, out, _ = cli("eval", "perplexity", text)
    assert code == 0
    assert float(out.split("bits_per_byte ")[1].split()[0]) < 4  # of a random model: 8


def test_a_tuned_state_is_used(cli, model_path, text, tmp_path):
    model = load(model_path)
    state = model.init_state(1)
    save_tuned_state(tmp_path / "s.safetensors", state.map(lambda t: t + 1), model.config)
    plain, tuned = (
        json.loads(cli("eval", "perplexity", text, "--model", model_path, "--json", *more)[1])["bits_per_byte"]
        for more in ((), ("--state", tmp_path / "s.safetensors"))
    )
    assert plain != tuned


def test_an_adapter_is_merged_first(cli, model_path, text, tmp_path):
    pytest.importorskip("peft")
    model, config = load(model_path), AdaptConfig(rank=2)
    attach(model, config)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.2)
    save_adapter(model, tmp_path / "adapter", config)
    merge(model)
    save_model(model, tmp_path / "merged.safetensors")
    calls = (("--model", model_path), ("--model", model_path, "--adapter", tmp_path / "adapter"),
             ("--model", tmp_path / "merged.safetensors"))  # fmt: skip
    plain, adapted, merged = (
        json.loads(cli("eval", "perplexity", text, "--json", *call)[1])["bits_per_byte"] for call in calls
    )
    assert plain != adapted
    assert adapted == pytest.approx(merged, rel=1e-4)


def test_loss_by_position_is_drawn(cli, model_path, text, tmp_path):
    pytest.importorskip("matplotlib")
    args = ("--length", 100, "--rows", 4, "--plot", tmp_path / "p.png", "--trained-length", 32)
    code, out, _ = cli("eval", "positions", text, "--model", model_path, *args)
    assert code == 0
    assert "from 0  to 0  nats " in out
    assert (tmp_path / "p.png").exists()


def test_needles_say_what_was_shared(cli, model_path):
    code, out, _ = cli("eval", "needle", "--model", model_path, "--lengths", 400, "--trials", 2, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens_read"] < found["tokens_asked"]
    assert len(found["table"]) == 5


def test_lambada_runs(cli, model_path, tmp_path):
    (tmp_path / "l.jsonl").write_text('{"text": "one two three"}\n')
    code, out, _ = cli("eval", "lambada", tmp_path / "l.jsonl", "--model", model_path, "--no-reuse")
    assert code == 0
    assert "questions 1" in out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("lambda", "x"), 1, "no task named 'lambda'. Did you mean 'lambada'?"),
        (("lambada",), 1, "the task 'lambada' needs a file: rookery eval lambada FILE"),
        (("lambada", "x", "--window", "3"), 2, "lambada has no option --window"),
        (("lm-eval",), 1, "name the harness's tasks"),
    ],
)
def test_wrong_calls_are_explained(cli, model_path, argv, code, message):
    if argv == ("lm-eval",):
        pytest.importorskip("lm_eval")
    found, _, err = cli("eval", *argv, "--model", model_path)
    assert found == code
    assert message in err
