import json

import pytest
import torch
from support.language import randomised

from rookery.models import save_model

QUICK = ["--samples", "200", "--clusters", "6", "--embedding-rows", "4", "--least-zeros", "0", "--predictor", "3"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, model_path):
    from rookery.cli.main import main

    out = tmp_path_factory.mktemp("lite") / "small.safetensors"
    assert main(["compress", model_path, "-o", str(out), *QUICK]) == 0
    return out


def test_a_model_is_compressed_and_generates(cli, small):
    code, out, _ = cli("generate", "--model", small, "hello", "-n", "5", "--seed", "1")
    assert code == 0
    assert out
    assert cli("generate", "--lean", "--model", small, "hello", "-n", "5", "--seed", "1")[1] == out


def test_what_is_evaluated_is_the_compressed_model(cli, small, model_path, tmp_path):
    (tmp_path / "text.txt").write_text("a text that is read. " * 20)
    results = []
    for path in (small, model_path):
        code, out, _ = cli("eval", "perplexity", tmp_path / "text.txt", "-m", path, "--tokenizer", "bytes", "--json")
        assert code == 0
        results.append(json.loads(out)["bits_per_byte"])
    assert results[0] != results[1]
    from rookery.compress.low_rank import LowRank
    from rookery.compress.sparsity import GuessedKey
    from rookery.evaluate.run import load_for_evaluation

    model, _ = load_for_evaluation(small, tokenizer="bytes")
    assert isinstance(model.blocks[0].ffn.key, GuessedKey)
    assert not any(isinstance(module, LowRank) for module in model.modules())


def test_what_was_done_is_told(cli, model_path, tmp_path):
    (tmp_path / "text.txt").write_text("some text to learn from. " * 40)
    options = [*QUICK, "--low-rank", "8", "--train", "2", "--text", tmp_path / "text.txt", "--int8"]
    code, out, err = cli("compress", model_path, "-o", tmp_path / "a.safetensors", *options)
    assert (code, out) == (0, "")
    for said in (
        "projections have rank 4",
        "step 2/2  loss",
        "the head has 6 clusters, the largest of",
        "of the hidden units are zero;",
        "low-rank projections (width / 8), sparse channel mixes, embedding cache of 4 rows, head of 6 clusters, int8",
    ):
        assert said in err


def test_memory_is_shown_by_part(cli, small, model_path):
    code, out, _ = cli("inspect", "--memory", small, "--tokens", "8")
    assert code == 0
    for part in ("dense float16", "formula", "resident", "time mix", "channel mix", "embedding", "head", "total"):
        assert part in out
    assert "a step of decoding read" in out
    assert "peak memory of the process" in out
    code, out, _ = cli("inspect", "--memory", "--json", small, "--tokens", "8")
    told = json.loads(out)
    assert set(told) == {"path", "techniques", "bytes", "read", "tokens", "peak", "before"}
    total = told["bytes"]["total"]
    assert total["resident"] == pytest.approx(total["formula"], rel=0.01)
    assert total["formula"] < total["dense float16"]
    code, out, _ = cli("inspect", "--memory", model_path, "--tokens", "4")
    assert "not compressed" in out
    assert "a step of decoding read" not in out


def test_failures_are_one_sentence(cli, small, tmp_path):
    out = tmp_path / "x.safetensors"
    code, _, err = cli("compress", small, "-o", out)
    assert (code, err.count("\n")) == (1, 1)
    assert "is compressed already" in err
    code, _, err = cli("compress", "-o", out, "--threshold", "7")
    assert (code, err) == (1, "rookery: threshold 7.0 of layer 0 must lie between 0 and 1\n")
    code, _, err = cli("compress", "-o", out, "--train", "5")
    assert (code, err.startswith("rookery: --train goes on training the model and needs text")) == (1, True)
    save_model(randomised("transformer-test", dtype=torch.float32), tmp_path / "t.safetensors")
    code, _, err = cli("compress", tmp_path / "t.safetensors", "-o", out)
    assert (code, "cannot be compressed; rwkv4, rwkv5, rwkv6, rwkv7 can" in err) == (1, True)
    assert not out.exists()
