import signal
import subprocess
import sys

import pytest

from rookery.cli.main import VERBS, main

MISSING = ["--model", "nothing.pth", "x"]
ROOKERY = [sys.executable, "-m", "rookery"]


def test_without_a_verb_the_verbs_are_listed(cli):
    code, out, err = cli()
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)
    assert cli("--help")[1] == out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli, verb):
    code, out, _ = cli(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: rookery {verb}")


def test_help_and_lists_import_nothing_slow():
    """A fresh process, because torch is in this one; `test_imports.py` looks at the modules themselves."""
    code = """
import sys
from rookery.cli.main import VERBS, main
for verb in VERBS: main([verb, "--help"])
main(["models"])
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {*done.stderr.split()} & {"torch", "tokenizers", "huggingface_hub", "tyro", "rich", "llguidance", "gguf"}


def test_the_version_is_told(cli):
    from rookery import __version__

    assert cli("--version")[:2] == (0, f"rookery {__version__}\n")


def test_an_unknown_verb_gets_the_nearest_one(cli):
    code, out, err = cli("genrate", "hello")
    assert (code, out) == (2, "")
    assert "no verb named 'genrate'. Did you mean 'generate'?" in err


@pytest.mark.parametrize("argv", [["--nonsense"], ["models", "--nonsense"], ["generate", "--temp", "1", "x"]])
def test_wrong_usage_exits_with_2(cli, argv):
    code, out, err = cli(*argv)
    assert (code, out) == (2, "")
    assert "unrecognized arguments" in err


def test_a_known_failure_is_one_line(cli):
    code, out, err = cli("tokenize", "--model", "nothing.pth", "x")
    assert (code, out) == (1, "")
    assert err.startswith("rookery: there is no file 'nothing.pth'")
    assert err.count("\n") == 1


def test_an_unexpected_failure_names_its_type(cli, monkeypatch):
    def fail(*args):
        raise KeyError("x")

    monkeypatch.setattr("rookery.registry.list_models", fail)
    assert cli("models") == (1, "", "rookery: KeyError: 'x' (unexpected; `--debug` shows where)\n")


@pytest.mark.parametrize("argv", [["tokenize", "--debug", *MISSING], ["--debug", "tokenize", *MISSING]])
def test_debug_lets_the_traceback_through(cli, argv):
    with pytest.raises(ValueError, match="there is no file"):
        cli(*argv)


def test_an_interruption_exits_with_130(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("rookery.registry.list_models", interrupt)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def endless(model_path):
    command = [*ROOKERY, "generate", "--model", model_path, "--ignore-eos", "--max-tokens", "10000000", "hello"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_ends_a_text_cleanly(model_path):
    with endless(model_path) as process:
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert len(begun) == 20
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err == b"interrupted\n"


def test_a_reader_that_leaves_is_no_failure_to_talk_about(model_path):
    with endless(model_path) as process:
        process.stdout.read(20)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert err == b""
