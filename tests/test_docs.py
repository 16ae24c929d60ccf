"""The Python in the documentation runs as it stands, and its lists are whole."""

import re
from pathlib import Path

import pytest

from rookery.cli.main import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in page.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_every_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL), 1):
        exec(compile(code, f"{page.name}, example {number}", "exec"), {})


def test_every_verb_is_documented():
    page = (ROOT / "docs/reference/command-line.md").read_text("utf-8")
    assert not [verb for verb in VERBS if f"| `{verb}` |" not in page]


def test_every_operator_is_documented():
    page = (ROOT / "docs/how-it-works/operators.md").read_text("utf-8")
    operators = {path.parent.name for path in ROOT.glob("src/rookery/ops/*/reference.py")}
    assert not [name for name in operators if f"`{name}`" not in page]
