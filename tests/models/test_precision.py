"""What float32 and bfloat16 cost every family, on the page that says so: it is true that …"""

import copy
import re
from pathlib import Path

import pytest
import torch
from support import language

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works" / "operators.md"
TABLE = {
    name: (float(single), float(half))
    for name, single, half in re.findall(r"^\| `([\w.-]+)` \| ([\d.e-]+) \| ([\d.e-]+) \|$", PAGE.read_text(), re.M)
}


def test_the_page_has_every_family_of_rwkv_and_none_that_is_not_there():
    assert {name for name in language.names() if re.match(r"rwkv\d|rosa", name)} <= set(TABLE) <= set(language.names())


@torch.no_grad()
@pytest.mark.parametrize("name", TABLE)
def test_logits_are_as_far_from_those_in_float64_as_the_page_says(name):
    half = language.randomised(name, dtype=torch.bfloat16)
    models = {"float32": copy.deepcopy(half).float(), "bfloat16": half}
    tokens = language.some_tokens(half, 2, language.LENGTH)
    want = copy.deepcopy(half).double()(tokens)[0]
    for (dtype, model), said in zip(models.items(), TABLE[name], strict=True):
        error = float((model(tokens)[0].double() - want).norm() / want.norm())
        # machines add up in another order, and ROSA may then find another match
        assert error < (3 if "rosa" in name else 1.5) * said, f"{dtype}: {error:.2e}, the page says {said:.2e}"
        assert error > said / 10, f"{dtype}: {error:.2e}, far better than the page's {said:.2e}: correct the page"
