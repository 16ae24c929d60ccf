"""The page on the speed of training: it is true that …"""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_filler():
    spec = importlib.util.spec_from_file_location("training_page", ROOT / "benchmarks" / "training_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_was_measured_last():
    filler = load_filler()
    page = filler.PAGE.read_text(encoding="utf-8")
    kept = {name: filler.RESULTS / f"{name}.json" for name in filler.BLOCKS}
    results = {name: json.loads(path.read_text()) for name, path in kept.items() if path.is_file()}
    assert results
    assert filler.filled(page, results) == page, "run python benchmarks/training_page.py"


def test_every_benchmark_has_its_place_and_its_table():
    filler = load_filler()
    machine = {"threads": 1, "device": "chip", "extensions": ["avx2"]}
    speeds = {"rwkv7": 1000.0, "gpt": 500.0, "naive": 10.0}
    cpu = {"dtype": "float32", "length": 512, "tokens_per_second": speeds, "rwkv7_over_gpt": 2, "rwkv7_over_naive": 100}
    gpu = {"size": "0.1b", "model": "gpt", "tokens_per_second": 2e5, "TFLOP/s": 300.0, "MFU of a product": 0.4}
    gpu |= {
        "MFU of the peak": None,
        "GB held at most": 12.5,
        "times as fast as the GPT": 1.0,
        "rows": 8,
        "length": 4096,
    }
    rows = {"train_cpu": cpu, "train_profile": {"what": "products", "ms_a_step": 3.0, "share": 0.5}, "train_gpu": gpu}
    page = filler.filled(
        filler.PAGE.read_text(encoding="utf-8"), {n: {"machine": machine, "rows": [r]} for n, r in rows.items()}
    )
    for line in (
        "| float32, rows of 512 tokens | 1,000 | 500 | 2.00 |",
        "100.0 times as fast",
        "| products | 3 | 50% |",
    ):
        assert line in page
    assert "| 0.1b, GPT | 200,000 | 300 | 40% |  | 12.5 | 1.00 |" in page
