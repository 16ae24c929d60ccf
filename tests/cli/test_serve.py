import argparse
import sys
import threading

import numpy as np
import pytest
import torch

from rookery.checkpoints.tuned_state import save_tuned_state
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
    for swap, reason in ((["x"], "takes NAME=FILE, got 'x'"), (["x=a", "x=b"], "names 'x' twice")):
        with pytest.raises(ValueError, match=f"--swap {reason}"):
            swapped(argparse.Namespace(swap=swap, adapter_alpha=None, template=None), base)


def test_tuned_states_are_served_beside_their_base_without_torch(model_path, tmp_path):
    base = LLM(model_path)
    shape = base.runner.config.wkv_shape
    for name, value in (("a", 0.5), ("b", -0.5)):
        state = {f"layers.{i}.wkv": np.full(shape, value) for i in range(base.runner.config.num_hidden_layers)}
        save_tuned_state(tmp_path / f"{name}.pth", state, base.runner.config)
    served = swapped(argparse.Namespace(swap=[f"{name}={tmp_path / name}.pth" for name in "ab"]), base)
    assert list(served) == ["a", "b"]
    for name, llm in served.items():
        assert llm.runner is base.runner
        session = base.session(tmp_path / f"{name}.pth")
        session.feed([1, 2, 3])
        np.testing.assert_array_equal(llm.logits([1, 2, 3])[-1], session._at.logits)
    assert not np.array_equal(served["a"].logits([1]), base.logits([1]))


def test_a_name_is_served_once(cli, tmp_path, model_path):
    config = LLM(model_path).runner.config
    state = {f"layers.{i}.wkv": np.ones(config.wkv_shape) for i in range(config.num_hidden_layers)}
    save_tuned_state(tmp_path / "s.pth", state, config)
    code, _, err = cli("serve", model_path, "--name", "m", "--swap", f"m={tmp_path / 's.pth'}")
    assert code == 1
    assert "--swap names 'm', which a model has already" in err


def test_what_a_cluster_needs_is_said_in_one_line(cli, tmp_path, monkeypatch):
    assert "--ray needs --state-folder DIR" in cli("serve", "--ray")[2]
    for wrong in ("0", "3:2", "x", ":4"):
        code, _, err = cli("serve", "--ray", "--state-folder", tmp_path, "--replicas", wrong)
        assert (code, "--replicas takes a number" in err) == (1, True)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "rookery.serve.cluster", raising=False)
    code, _, err = cli("serve", "--ray", "--state-folder", tmp_path)
    assert code == 1
    assert err.splitlines()[-1].endswith('--ray needs ray: pip install "rookery[cluster]"')
