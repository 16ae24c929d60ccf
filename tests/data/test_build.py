"""Building token files: it is true that …"""

import json
import sys

import pytest

from rookery.cli.main import main
from rookery.data.binidx import BinIdx
from rookery.data.documents import read_documents
from rookery.errors import MissingDependency

TEXTS = ["The first document.", "", "Der zweite: äöü.", "x" * 1000]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_built_tokens_are_the_documents_each_ended(source, tmp_path, capsys, processes, monkeypatch):
    monkeypatch.setattr("rookery.data.build.PARCEL", 10)
    out = tmp_path / "tokens"
    command = ["data", "build", str(source), "--out", str(out), "--tokenizer", "bytes", "--processes", str(processes)]
    assert main(command) == 0
    data = BinIdx(out)
    assert [bytes(data[i].tolist()) for i in range(len(data))] == [text.encode() + b"\0" for text in TEXTS]
    assert "4 documents" in capsys.readouterr().out


def test_no_documents_are_an_error_that_leaves_nothing(tmp_path, capsys):
    (tmp_path / "none.json").write_text("[]")
    assert main(["data", "build", str(tmp_path / "none.json"), "--out", str(tmp_path / "x")]) == 1
    assert "there are no documents" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["none.json"]


def test_parquet_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == TEXTS
    parquet.write_table(arrow.table({"n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match='expected a column "text", found n'):
        list(read_documents(tmp_path / "b.parquet"))


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(*names, **how):
            asked.append((names, how))
            return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert list(read_documents("hf:owner/name:config:validation")) == ["a", "b"]
    assert list(read_documents("hf:owner/name")) == ["a", "b"]
    assert asked == [
        (("owner/name", "config"), {"split": "validation", "streaming": True}),
        (("owner/name",), {"split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize(("name", "module"), [("hf:x", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_library_is_named(monkeypatch, tmp_path, name, module):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=r"rookery\[train\]"):
        list(read_documents(name))
