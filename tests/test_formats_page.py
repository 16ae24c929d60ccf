"""docs/reference/checkpoint-formats.md says what is true: every cell of its table is tried with a tiny model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.engine.runners.native import NativeRunner
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import BackendUnavailable
from rookery.models import save_model
from rookery.registry import families

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "checkpoint-formats.md"
COLUMNS = {"official": "m.safetensors", "pth": "m.pth", "hf": "hf", "fla": "fla", "gguf": "m.gguf", "ggmf": "m.bin"}
OVERRIDES = {"rad-rwkv6": {"num_attention_heads": 2}}
"""Where the tiny preset is no model that other programs know."""


def rows():
    """Family -> its cells, as the page has them."""
    table = re.search(r"<!-- checked by a test -->\n(.*?)\n\n", PAGE.read_text("utf-8"), re.DOTALL)[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0][1:] == [*COLUMNS, "web-rwkv", "compiled", "torch"]
    return {row[0].strip("`"): row[1:] for row in cells[2:]}


def written(source, path, target):
    """What happens on the way there and back: "=" the same numbers, "≈" up to rounding, "–" no such way."""
    try:
        convert(source, path, to=target)
    except ValueError as refused:
        return "–" if "cannot be written as" in str(refused) else str(refused)
    convert(path, path.with_name(f"back-{target}.pth"))  # RWKV-5 of rwkv.cpp means its weights otherwise
    own, back = open_checkpoint(source), open_checkpoint(path.with_name(f"back-{target}.pth"))
    assert list(own) == list(back)
    if all(np.array_equal(own[name], back[name]) for name in own):
        return "="
    for name in own:
        np.testing.assert_allclose(back[name], own[name], rtol=1e-5, atol=1e-5, err_msg=name)
    return "≈"


@pytest.mark.parametrize("name", list(rows()))
def test_the_row_of_a_family_is_true(tmp_path, name):
    source = tmp_path / "source.safetensors"
    save_model(tiny(f"{name}-test", dtype=torch.float32, **OVERRIDES.get(name, {})), source)
    found = [written(source, tmp_path / file, target) for target, file in COLUMNS.items()]
    found.append("read" if "web-rwkv" in families()[name].layouts else "–")
    try:
        found.append(NativeRunner(source) and "yes")
    except BackendUnavailable:
        found.append("–")
    found.append(TorchRunner.load(source) and "yes")
    assert found == rows()[name]


def test_every_language_family_with_names_of_its_own_elsewhere_has_a_row():
    language = [family for family in families().values() if family.kind == "language"]
    assert {family.name for family in language if family.layouts} <= rows().keys()
