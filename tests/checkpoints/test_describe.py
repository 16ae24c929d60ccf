import json

import pytest
import torch
from support.data import shared
from support.files import tiny

from rookery.checkpoints.describe import inspect, readable, render
from rookery.errors import BadCheckpoint
from rookery.models import save_model


def test_a_summary_says_what_a_file_is(tmp_path):
    model = tiny(vocab_size=256, dtype=torch.bfloat16)
    save_model(model, tmp_path / "m.safetensors", metadata={"note": "first\nlight"})
    summary = inspect(tmp_path / "m.safetensors")
    count = sum(p.numel() for p in model.parameters())
    assert summary == {
        "path": str(tmp_path / "m.safetensors"),
        "format": "safetensors",
        "layout": "official",
        "family": "rwkv7",
        "config": summary["config"],
        "parameters": count,
        "tensors": len(model.state_dict()),
        "bytes": {"bfloat16": 2 * count},
        "tokenizer": "bytes",
        "unused": [],
        "tuned_state": False,
        "fingerprint": model.fingerprint(),
        "metadata": {"note": "first\nlight"},
    }
    assert summary["config"]["head_dim"] == 16
    assert json.loads(json.dumps(summary)) == summary


def test_the_text_of_a_summary_has_one_line_for_each_thing(tmp_path):
    metadata = {"tokenizer": "bytes", "note": "first\nlight " * 100}
    save_model(tiny(vocab_size=300), tmp_path / "m.safetensors", metadata=metadata)
    lines = render(inspect(tmp_path / "m.safetensors")).splitlines()
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert table["family"] == "rwkv7"
    assert table["tokenizer"] == "bytes"
    assert table["config.head_dim"] == "16"
    assert table["metadata.note"].startswith("first light")
    assert table["metadata.note"].endswith("…")
    assert max(map(len, lines)) < 300


def test_unused_tensors_and_missing_tokenizers_are_told(tmp_path):
    torch.save(tiny().state_dict() | {"blocks.0.att.v0": torch.ones(1)}, tmp_path / "m.pth")
    text = render(inspect(tmp_path / "m.pth"))
    assert "not used" in text
    assert "blocks.0.att.v0" in text
    assert "none found; name one with --tokenizer" in text


@pytest.mark.data
def test_quantised_files_show_their_bytes_by_type():
    summary = inspect(shared("models/rwkv_cpp/tiny-rwkv-7v0-834K-Q5_1.bin"))
    assert summary["parameters"] == 829_888
    assert set(summary["bytes"]) == {"float32", "Q5_1"}
    size = shared("models/rwkv_cpp/tiny-rwkv-7v0-834K-Q5_1.bin").stat().st_size
    assert 0.98 * size < sum(summary["bytes"].values()) < size
    assert summary["tokenizer"] == "bytes"


def test_what_is_no_model_has_no_summary(tmp_path):
    (tmp_path / "m").write_text("hello")
    with pytest.raises(BadCheckpoint):
        inspect(tmp_path / "m")


def test_sizes_are_readable():
    assert [readable(n) for n in (0, 999, 1000, 1_500_000, 2 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.5 MB",
        "2.0 TB",
    ]
