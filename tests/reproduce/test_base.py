"""Parts are kept, outcomes are checked, files are whole: it is true that …"""

import json
import subprocess
import sys

import pytest

from rookery.errors import UnknownName
from rookery.reproduce import reproduction
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import cell, markdown_table, mean_spread, reflow, write

ROWS = [
    {"model": "ours", "baseline": False, "size": 1200, **mean_spread("loss", [1.0, 1.5])},
    {"model": "theirs", "baseline": True, "size": 1300, **mean_spread("loss", [2.0, 2.0])},
]


def outcome(**changes):
    fields = {
        "table": ROWS,
        "shown": False,
        "findings": "Nothing.",
        "setup": "Small.",
        "seeds": (0, 1),
        "plot": lambda figure: figure.subplots().plot([0, 1]),
    }
    return Outcome(**(fields | changes))


def test_a_finished_part_is_not_computed_again(tmp_path, capsys):
    calls = []

    def compute():
        calls.append(1)
        return {"loss": 1.5}

    for _ in range(2):
        work = Work(scale="default", folder=tmp_path, planned=2)
        assert work.part("a-0", compute) == {"loss": 1.5}
        assert work.seconds > 0  # what earlier calls spent counts
    assert calls == [1]
    assert "[1/2] a-0: 0.0 s" in capsys.readouterr().err


def test_a_part_may_have_any_name(tmp_path):
    for _ in range(2):
        work = Work(scale="default", folder=tmp_path)
        assert work.part("heads of 8, n = 4: a/b", lambda: 1) == 1
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["heads-of-8-n-4-a-b.json"]
    assert work.reused == 1


def test_an_interrupted_part_leaves_nothing_behind(tmp_path):
    work = Work(scale="default", folder=tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.part("a", interrupted)
    assert Work(scale="default", folder=tmp_path).part("a", lambda: 3) == 3


def test_sizes_follow_the_scale(tmp_path):
    sizes = {"quick": 1, "default": 2, "full": 3}
    assert [Work(scale=scale, folder=tmp_path).size(**sizes) for scale in sizes] == [1, 2, 3]


def test_an_outcome_needs_two_seeds_and_a_baseline():
    with pytest.raises(AssertionError, match="two seeds"):
        outcome(seeds=(0, 0))
    with pytest.raises(AssertionError, match="baseline"):
        outcome(table=[ROWS[0]])


def test_the_record_says_how_it_was_made(tmp_path):
    work = Work(scale="full", folder=tmp_path / ".work", seconds=3.0)
    tried = Reproduction(name="x", claim="So it is.", source="a paper", experiment=lambda work: outcome())
    record = json.loads(write(tried, outcome(), work, tmp_path).read_text("utf-8"))
    assert record["command"] == "rookery reproduce x --full"
    assert record["verdict"] == "not shown"
    assert record["table"][0]["loss"] == 1.25
    page = (tmp_path / "x.md").read_text("utf-8")
    assert "| ours | 1,200 | 1.250 ± 0.250 |\n| theirs * | 1,300 | 2.000 ± 0.000 |" in page
    assert "mean nothing" not in page


def test_numbers_are_written_for_people():
    assert [cell(value) for value in (None, "a", 12345, 12345.6, 123.4, 1.23456)] == [
        "–",
        "a",
        "12,345",
        "12,346",
        "123",
        "1.235",
    ]
    assert markdown_table([{"a": 1.0, "a ±": 0.5, "baseline": True}]) == "| a |\n|---|\n| 1.000 ± 0.500 * |"


def test_paragraphs_are_wrapped_anew_and_lists_are_not():
    assert reflow("one\ntwo\n\n- three\n- four\n", width=20) == "one two\n\n- three\n- four"
    assert reflow("one two three", width=8) == "one two\nthree"


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UnknownName, match="no reproduction named 'recal'. Did you mean 'recall'"):
        reproduction("recal")


def test_listing_imports_no_torch():
    code = "import sys; from rookery.cli.main import main; main(['reproduce']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rwkv-families" in done.stdout
