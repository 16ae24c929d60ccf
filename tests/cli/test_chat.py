import os
import signal

import pytest

from rookery.cli.options import interruptions
from rookery.engine.llm import LLM

FLAGS = ["--template", "g1", "--temperature", "0", "-n", "20"]


@pytest.fixture
def chat(cli, model_path):
    return lambda *argv, **stdin: cli("chat", "--model", model_path, *argv, **stdin)


def test_every_line_gets_an_answer(chat, model_path):
    code, out, err = chat(*FLAGS, "--system", "Be brief.", stdin=b"hello\n\nand more\n")
    assert (code, err) == (0, "")
    session = LLM(model_path, template="g1").session()
    first = session.reply("hello", 20, temperature=0, system="Be brief.")
    answers = ["".join(first).lstrip(), "".join(session.reply("and more", 20, temperature=0)).lstrip()]
    assert out == "".join(answer + "\n" for answer in answers)


def test_reset_begins_anew_and_exit_ends(chat):
    _, out, _ = chat(*FLAGS, stdin=b"hello\n/reset\nhello\n/exit\nhello\n")
    first = chat(*FLAGS, stdin=b"hello\n")[1]
    assert out == first + first


def test_a_model_without_a_template_offers_generate(chat):
    code, out, err = chat("--temperature", "0", stdin=b"hello\n")
    assert (code, out) == (1, "")
    assert "no chat template is known for the model 'tiny.safetensors': use `generate`" in err
    assert "--template: g1, world, raven" in err


def test_a_conversation_goes_on_from_a_file(chat, tmp_path):
    both = chat(*FLAGS, stdin=b"hello\nmore\n")[1]
    first = chat(*FLAGS, "--save-state", tmp_path / "s", stdin=b"hello\n")[1]
    second = chat(*FLAGS, "--state", tmp_path / "s", stdin=b"more\n")[1]
    assert first + second == both


def test_an_interruption_is_noted_and_not_raised():
    with interruptions() as wanted:
        os.kill(os.getpid(), signal.SIGINT)
        assert wanted == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
