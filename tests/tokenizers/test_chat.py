import pytest

from rookery.errors import UnknownName
from rookery.tokenizers.chat import TEMPLATES, clean, get_template, render, template_of_model


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TALK = [user("hi"), assistant("Hello."), user("who?")]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {"properties": {"a": {"type": "number"}, "b": {}}},
    },
}

# core.md 3.4
RENDERED = {
    "single turn": (([user("hi")],), "User: hi\n\nAssistant:"),
    "many turns": ((TALK,), "User: hi\n\nAssistant: Hello.\n\nUser: who?\n\nAssistant:"),
    "system": (([system("Be brief."), user("hi")],), "System: Be brief.\n\nUser: hi\n\nAssistant:"),
    "think": (([user("hi")], "g1", True), "User: hi\n\nAssistant: <think"),
    "think, by name": (([user("hi")], "g1", "think"), "User: hi\n\nAssistant: <think"),
    "no thought": (([user("hi")], "g1", False), "User: hi\n\nAssistant:"),
    "low": (([user("hi\n")], "g1", "low"), "User: hi (think a bit)\n\nAssistant: <think"),
    "medium": (([user("hi")], "g1", "medium"), "User: hi (think)\n\nAssistant: <think"),
    "high": ((TALK, "g1", "high"), "User: hi\n\nAssistant: Hello.\n\nUser: who? (think a lot)\n\nAssistant: <think"),
    "fake": (([user("hi")], "g1", "fake"), "User: hi\n\nAssistant: <think>\n</think"),
    "fake-short": (([user("hi")], "g1", "fake-short"), "User: hi\n\nAssistant: <think></think"),
    "answer begun": (([user("hi"), assistant("Hello, ")],), "User: hi\n\nAssistant: Hello, "),
    "raven": ((TALK, "raven"), "Bob: hi\n\nAlice: Hello.\n\nBob: who?\n\nAlice:"),
    "raven, system": (([system("A talk."), user("hi")], "raven"), "A talk.\n\nBob: hi\n\nAlice:"),
    "tools": (
        ([user("1+2?")], "g1", None, ["f(x: string)", ADD]),
        "System: Tools:\n- f(x: string)\n- add(a: number, b: any): The sum.\nReturn only a JSON function call.\n\n"
        "User: 1+2?\n\nAssistant: ```json",
    ),
    "tools and system": (
        ([system("Be brief."), user("1+2?")], "g1", None, ["f()"]),
        "System: Be brief.\nTools:\n- f()\nReturn only a JSON function call.\n\nUser: 1+2?\n\nAssistant: ```json",
    ),
    "tools and thought": (
        ([user("1+2?")], "g1", True, ["f()"]),
        "System: Tools:\n- f()\nReturn only a JSON function call.\n\nUser: 1+2?\n\nAssistant: <think",
    ),
    "result of a tool": (
        ([user("1+2?"), assistant("```json\n{}\n```"), {"role": "tool", "content": "3\n\n"}], "g1", None, ["f()"]),
        "System: Tools:\n- f()\nReturn only a JSON function call.\n\nUser: 1+2?\n\nAssistant: ```json\n{}\n```\n\n"
        "User: Function output: 3\n\nAssistant:",
    ),
}


@pytest.mark.parametrize("case", RENDERED)
def test_prompts_are_the_published_ones(case):
    arguments, prompt = RENDERED[case]
    assert render(*arguments) == prompt


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_never_end_in_white_space(template):
    assert render(TALK, template) == render(TALK, template).rstrip()


def test_world_conversations_begin_with_an_example_unless_there_is_a_system_turn():
    assert render([user("who?")], "world").startswith("User: hi\n\nAssistant: Hello!")
    assert render([user("who?")], "world").endswith("\n\nUser: who?\n\nAssistant:")
    assert render([system("Be brief."), user("who?")], "world") == "System: Be brief.\n\nUser: who?\n\nAssistant:"


def test_turns_are_cleaned_of_what_ends_a_turn():
    assert clean(" a\r\n\r\n\r\nb\n\nUser: c \n") == "a\nb\nUser: c"
    assert render([system("x\n\ny"), user("a\r\n\r\nb ")]) == "System: x\ny\n\nUser: a\nb\n\nAssistant:"


def test_answers_keep_their_blank_lines():
    assert "Assistant: one\n\ntwo\n\nUser: b" in render([user("a"), assistant("one\n\ntwo\n"), user("b")])


def test_unknown_templates_roles_and_ways_are_refused():
    with pytest.raises(UnknownName, match=r"no chat template named 'wrld'\. Did you mean 'world'"):
        get_template("wrld")
    with pytest.raises(ValueError, match="has no way to think named 'hard'; it has: think, low"):
        render([user("a")], "g1", "hard")
    with pytest.raises(ValueError, match="'raven' has no way to think named 'think'; it has: none"):
        render([user("a")], "raven", True)
    with pytest.raises(ValueError, match="'world' has no role 'tool'; its roles are system, user, assistant"):
        render([user("a"), {"role": "tool", "content": "b"}], "world")
    with pytest.raises(ValueError, match="'raven' has no tools"):
        render([user("a")], "raven", None, ["f()"])
    with pytest.raises(ValueError, match='needs a message of the role "user"'):
        render([system("a")])


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("rwkv7-g1d-0.4b-20260210-ctx8192.pth", "g1"),
        ("rwkv7-g0-7.2b-20250722-ctx4096", "g1"),
        ("rwkv7a-g1b-0.1b-20250819-ctx4096.pth", "g1"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world"),
        ("RWKV-4-Raven-3B-v12-Eng98%-Other2%-20230520-ctx4096.pth", "raven"),
        ("RWKV-4-Pile-169M-20220807-8023.pth", None),
        ("model.safetensors", None),
    ],
)
def test_file_names_of_published_models_tell_the_template(name, template):
    assert template_of_model(name) == template


def test_answers_stop_at_the_next_turn():
    assert "\n\nUser:" in get_template("g1").stops
    assert get_template("raven").stops == get_template("world").stops == ("\n\n",)
