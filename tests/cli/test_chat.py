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


def test_the_turns_of_a_conversation_can_be_taken_back(chat):
    twice = chat(*FLAGS, stdin=b"hello\nmore\n/rewind\nmore\n")
    lines = chat(*FLAGS, stdin=b"hello\nmore\n")[1]
    first = chat(*FLAGS, stdin=b"hello\n")[1]
    assert twice[1] == lines + lines.removeprefix(first)
    assert twice[2] == "1 turns are left\n"
    again = chat(*FLAGS, "--system", "Be brief.", stdin=b"hello\nmore\n/rewind 2\nhello\n")[1]
    assert again.endswith(chat(*FLAGS, "--system", "Be brief.", stdin=b"hello\n")[1])
    for wrong in (b"0", b"9", b"x"):
        code, _, err = chat(*FLAGS, stdin=b"hello\n/rewind " + wrong + b"\n")
        assert (code, f"from 1 to 1, got {wrong.decode()}" in err) == (0, True)


def test_a_fork_leaves_the_conversation_as_it_is(chat):
    told = chat(*FLAGS, stdin=b"hello\n/fork b\nfork\n/switch 1\nmore\n/fork b\n/switch c\n/switch\n")
    plain = chat(*FLAGS, stdin=b"hello\nmore\n")[1]
    fork = chat(*FLAGS, stdin=b"hello\nfork\n")[1]
    first = chat(*FLAGS, stdin=b"hello\n")[1]
    assert told[1] == fork + plain.removeprefix(first)
    assert "in 'b' now, a copy of '1'" in told[2]
    assert "there is a conversation named 'b' already" in told[2]
    assert "there is no conversation named 'c'; there are: 1, b" in told[2]
    assert told[2].endswith("> 1: 2 turns\n  b: 2 turns\n")


def test_a_conversation_is_saved_and_loaded_in_the_middle(chat, tmp_path):
    both = chat(*FLAGS, stdin=b"hello\nmore\n")[1]
    path = str(tmp_path / "s").encode()
    _, out, err = chat(*FLAGS, stdin=b"hello\n/save " + path + b"\nother\n/load " + path + b"\nmore\n/load\n/save\n")
    assert out.endswith(both.removeprefix(chat(*FLAGS, stdin=b"hello\n")[1]))
    assert f"saved to {path.decode()}" in err
    assert "/load needs the name of a file" in err
    assert "/save needs the name of a file" in err
    code, _, err = chat(*FLAGS, stdin=b"/load nothing\nhello\n")
    assert (code, "there is no state file 'nothing'" in err) == (0, True)


def test_a_turn_may_have_several_lines(chat, model_path):
    one = chat(*FLAGS, stdin=b"hello\\\nyou\n")[1]
    assert one == chat(*FLAGS, stdin=b'"""\nhello\nyou\n"""\n')[1]
    assert one == chat(*FLAGS, stdin=b'\n"""\n"""\n"""\nhello\nyou\n')[1]
    session = LLM(model_path, template="g1").session()
    assert one == "".join(session.reply("hello\nyou", 20, temperature=0)).lstrip() + "\n"


def test_the_way_to_think_can_be_chosen(chat):
    thinking = chat(*FLAGS, "--think", "low", stdin=b"hello\n")[1]
    _, out, err = chat(*FLAGS, stdin=b"/think low\nhello\n/reset\n/think off\nhello\n/think deep\n/think\n")
    assert out == thinking + chat(*FLAGS, stdin=b"hello\n")[1]
    assert "thinking: low (of think, low, medium, high, fake, fake-short, off)" in err
    assert "there is no way to think named 'deep'" in err
    assert err.endswith("thinking: off (of think, low, medium, high, fake, fake-short, off)\n")


def test_the_state_is_shown_as_a_picture(chat):
    _, _, err = chat(*FLAGS, stdin=b"hello\n/state\n/history\n")
    lines = err.splitlines()
    assert "tokens in a state of" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "█" * 40 in err
    assert "> hello" in lines


def test_commands_are_listed_and_others_refused(chat, model_path):
    _, out, err = chat(*FLAGS, stdin=b"/help\n/nonsense\n//path\n")
    assert all(name in err for name in ("/fork", "/rewind", "/save", "/load", "/state", "/think"))
    assert "there is no command /nonsense; /help lists them" in err
    answer = LLM(model_path, template="g1").session().reply("/path", 20, temperature=0)
    assert out == "".join(answer).lstrip() + "\n"
