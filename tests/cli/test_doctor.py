import json

from rookery.cli.doctor import examine
from rookery.ops.wkv7 import OP


def test_operators_and_their_backends_are_told(cli):
    code, out, _ = cli("doctor")
    assert code == 0
    assert "wkv7 on cpu" in out
    told = json.loads(cli("doctor", "--json")[1])
    assert list(told["operators"]["wkv7"]["cpu"]) == list(OP.backends)
    assert told["operators"]["wkv7"]["cpu"]["reference"] is None


def test_a_backend_that_cannot_run_says_why(monkeypatch, cli):
    monkeypatch.setattr("rookery.ops.dispatch._NATIVE", "the compiled module is missing (reason)")
    assert examine()["operators"]["wkv7"]["cpu"]["native"] == "the compiled module is missing (reason)"
    assert "native     the compiled module is missing (reason)" in cli("doctor")[1]


def test_an_instruction_set_that_is_not_used_is_told(monkeypatch, cli):
    assert "; note " not in cli("doctor")[1]
    monkeypatch.setattr("rookery._native.isa_note", lambda: "the processor's tiles add up in another order")
    assert "; note the processor's tiles add up in another order" in cli("doctor")[1]


def test_what_is_not_installed_is_told(monkeypatch, cli):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "rookery._native", None)
    monkeypatch.setattr("rookery._native", None, raising=False)
    monkeypatch.delattr("rookery._native")
    code, out, _ = cli("doctor")
    assert code == 0
    assert "torch           not installed: training" in out
    assert "native          missing (" in out
    assert "operators" not in out


def test_the_profile_of_a_model_is_shown(cli):
    code, out, _ = cli("doctor", "--profile", "", "--quantize", "int8", "--threads", "1")
    assert code == 0
    assert "channel mix" in out
    assert "hidden units were zero" in out
    told = json.loads(cli("doctor", "--json", "--profile", "", "--isa", "portable")[1])
    parts = {part["part"]: part for part in told["parts"]}
    assert told["isa"] == "portable"
    assert parts["step"]["bytes"] == sum(part["bytes"] for name, part in parts.items() if name != "step")
