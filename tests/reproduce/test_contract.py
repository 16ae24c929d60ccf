"""Every reproduction in its quick form, and every committed page: it is true that …"""

import json
from pathlib import Path

import pytest

from rookery.reproduce import REPRODUCTIONS, reproduction
from rookery.reproduce.report import index, run

PAGES = Path(__file__).parents[2] / "docs/reproductions"
COMMITTED = sorted(path.stem for path in PAGES.glob("*.json"))
KEYS = {"name", "claim", "verdict", "seeds", "table", "seconds", "command"}


def check(record):
    assert set(record) >= KEYS
    assert record["verdict"] in ("shown", "not shown")
    assert len(set(record["seeds"])) >= 2
    assert len(record["table"]) >= 2
    assert [row for row in record["table"] if row.get("baseline") is True]
    assert len({tuple(row) for row in record["table"]}) == 1, "rows have the same keys"
    assert record["command"].startswith(f"rookery reproduce {record['name']}")


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_quick_run_writes_page_plot_and_record(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without the data folder, as on somebody else's machine
    path = run(name, scale="quick", out=tmp_path)
    record = json.loads(path.read_text("utf-8"))
    check(record)
    assert record["name"] == name == reproduction(name).name
    page = path.with_suffix(".md").read_text("utf-8")
    assert record["claim"] in page
    assert f"({name}.png)" in page
    assert "the figures mean nothing" in page
    assert str(tmp_path) not in page + json.dumps(record)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"[{name}]({name}.md)" in (tmp_path / "index.md").read_text("utf-8")
    assert not [part for part in tmp_path.iterdir() if part.suffix == ".part"]


def test_a_second_call_draws_from_what_is_finished(tmp_path, capsys):
    first = json.loads(run("recall", scale="quick", out=tmp_path).read_text("utf-8"))
    assert "were there already" not in capsys.readouterr().err
    (tmp_path / "recall.md").unlink()
    again = json.loads(run("recall", scale="quick", out=tmp_path).read_text("utf-8"))
    assert "10 parts were there already; to make them again, delete" in capsys.readouterr().err
    assert again == first
    assert (tmp_path / "recall.md").exists()


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_record_has_its_page_and_plot(name):
    record = json.loads((PAGES / f"{name}.json").read_text("utf-8"))
    check(record)
    assert record["name"] == name
    assert name in REPRODUCTIONS
    assert "--quick" not in record["command"]
    assert record["claim"] in (PAGES / f"{name}.md").read_text("utf-8")
    assert (PAGES / f"{name}.png").stat().st_size > 1000


def test_the_committed_list_is_that_of_the_records():
    assert (PAGES / "index.md").read_text("utf-8") == index(PAGES)
