"""The Python in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

from rookery.engine.llm import EMBEDDED

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in page.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_every_page_run(page, tmp_path, monkeypatch):
    if "rookery.LLM()" in page.read_text("utf-8") and not EMBEDDED.is_dir():
        pytest.skip("this checkout has no embedded model")
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL), 1):
        exec(compile(code, f"{page.name}, example {number}", "exec"), {})
