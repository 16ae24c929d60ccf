import argparse
import threading

import numpy as np
import pytest
import torch

from rookery.cli.main import main
from rookery.cli.serve import swapped
from rookery.engine.llm import LLM
from rookery.models import load


def test_a_new_key_is_printed_with_its_line(cli):
    code, out, err = cli("serve", "--new-key", "anna")
    key, line = out.splitlines()
    assert code == 0
    assert key.startswith("rk-")
    assert line.startswith("anna:")
    assert "shown only now" in err


def test_wrong_models_and_keys_are_one_line(cli, tmp_path):
    assert cli("serve", tmp_path / "nothing.pth")[0] == 1
    (tmp_path / "keys").write_text("x")
    code, _, err = cli("serve", "--keys", tmp_path / "keys")
    assert code == 1
    assert "expected name:sha256" in err
    assert main(["serve", "--port", "x"]) == 2


def test_adapters_are_served_beside_their_base(model_path, tmp_path):
    width = load(model_path).blocks[0].att.key.weight.shape[1]
    for name, value in (("a", 0.1), ("b", -0.2)):
        torch.save({"blocks.0.att.key.disha": torch.full((4, width), value)}, tmp_path / f"{name}.pth")
    base = LLM(model_path)
    given = argparse.Namespace(
        swap=[f"{name}={tmp_path / name}.pth" for name in "ab"], adapter_alpha=None, template=None
    )
    served = swapped(given, base)
    expected = {name: LLM(model_path, adapter=tmp_path / f"{name}.pth").logits([1, 2, 3]) for name in "ab"}
    found = {}
    threads = [
        threading.Thread(target=lambda n=name: found.update({n: [served[n].logits([1, 2, 3]) for _ in range(8)]}))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":  # each its own, though they compute side by side
        for logits in found[name]:
            np.testing.assert_allclose(logits, expected[name], rtol=1e-3, atol=1e-3)
    assert served["a"].generate("hello", max_tokens=2, temperature=0.0) is not None
    with pytest.raises(ValueError, match="--swap takes NAME=FILE, got 'x'"):
        swapped(argparse.Namespace(swap=["x"], adapter_alpha=None, template=None), base)
