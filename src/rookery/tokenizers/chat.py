"""Chat templates: how turns become the one text that a model continues.

A blank line ends a turn, so no turn of the user or the system may contain one. A prompt ends in the name of the speaker
and a colon, never in a space: the model's own tokens begin with their space.
(github.com/BlinkDL/RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt; github.com/BlinkDL/ChatRWKV, API_DEMO_CHAT.py, v2/chat.py)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rookery.errors import unknown

END_OF_TURN = "\n\n"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The names of the speakers and what a model was taught besides."""

    name: str
    """What `get_template` finds it by."""
    speakers: Mapping[str, str]
    """Role ("user", "assistant", …) to what stands before a turn's text; "" for a text without a speaker."""
    stops: tuple[str, ...]
    """An answer ends before the first of these. Token 0 ends every answer."""
    opening: tuple[tuple[str, str], ...] = ()
    """Role and text of turns that begin a conversation without a system turn."""
    thinking: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Way to think -> what follows the user's text, what the answer begins with (the model closes the bracket)."""
    tools: bool = False
    """Whether the model was taught to call functions."""


_WORLD = {"system": "System:", "user": "User:", "assistant": "Assistant:"}

TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate(
            name="g1",
            speakers=_WORLD | {"tool": "User: Function output:"},
            # its answers may contain blank lines
            stops=("\n\nUser:", "\n\nSystem:"),
            thinking={
                "think": ("", " <think"),
                "low": (" (think a bit)", " <think"),
                "medium": (" (think)", " <think"),
                "high": (" (think a lot)", " <think"),
                # a thought that is over before it began: the answer's quality without the wait
                "fake": ("", " <think>\n</think"),
                "fake-short": ("", " <think></think"),
            },
            tools=True,
        ),
        ChatTemplate(
            name="world",
            speakers=_WORLD,
            stops=(END_OF_TURN,),
            opening=(("user", "hi"), ("assistant", "Hello! I am your assistant. Ask me whatever you like.")),
        ),
        ChatTemplate(
            name="raven",
            speakers={"system": "", "user": "Bob:", "assistant": "Alice:"},
            stops=(END_OF_TURN,),
        ),
    )
}


def get_template(name: str) -> ChatTemplate:
    """The template of that name; `UnknownName` with the nearest one if there is none."""
    if name not in TEMPLATES:
        raise unknown("chat template", name, TEMPLATES, f"The list {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_of_model(name: str) -> str | None:
    """The template that a published model's file name tells ("…-g1d-0.4b-…", "…-World-…", "…-Raven-…"), if any."""
    for template, pattern in (("g1", r"g[01][a-z]?"), ("world", r"world"), ("raven", r"raven")):
        if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", name.lower()):
            return template
    return None


def clean(text: str) -> str:
    """User and system text without what would end the turn: blank lines, and white space around it."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def render(
    messages: Sequence[Mapping[str, str]],
    template: str | ChatTemplate = "g1",
    think: str | bool | None = None,
    tools: Sequence[str | Mapping[str, Any]] = (),
) -> str:
    """The prompt of a conversation: `messages` have "role" and "content".

    It ends where the assistant is to speak, or, when the last message is the assistant's, inside that one. `think` is
    one of the template's ways to think (True: "think"). `tools` are functions that the model may call, as lines such as
    "add(a: number, b: number)" or in OpenAI's form; the answer then begins a JSON code block, unless the last message
    brings a function's result ("tool"). Raises ValueError for messages, ways or tools that the template does not know.
    """
    if isinstance(template, str):
        template = get_template(template)
    suffix, beginning = _way_to_think(template, think)
    turns = [(message["role"], message["content"]) for message in messages]
    _check_turns(template, turns)
    if tools:
        turns = _with_tools(template, turns, tools)
    if turns[0][0] != "system":
        turns = [*template.opening, *turns]
    if suffix:
        last = max(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[last] = ("user", clean(turns[last][1]) + suffix)
    *before, (role, content) = turns
    text = "".join(_turn(template, *turn) + END_OF_TURN for turn in before)
    if role == "assistant":
        return text + _spoken(template.speakers[role], content.lstrip())
    if tools and not beginning and role != "tool":
        beginning = " ```json"
    return text + _turn(template, role, content) + END_OF_TURN + template.speakers["assistant"] + beginning


def spoken_parts(messages: Sequence[Mapping[str, str]], template: str | ChatTemplate = "g1") -> list[tuple[str, bool]]:
    """A finished conversation for training: pieces of its text, each with whether a model is to learn to say it.

    Learned are the answers, with the space before them and, where a turn follows, the blank line that ends them: what
    the model has to say by itself behind the prompt that `render` makes. The text ends with the last turn; the end-of-
    text token that a model must learn as well is the caller's to add. Raises ValueError for what `render` refuses, and
    for a conversation without an answer.
    """
    if isinstance(template, str):
        template = get_template(template)
    turns = [(message["role"], message["content"]) for message in messages]
    _check_turns(template, turns)
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError('a conversation to learn from needs a message of the role "assistant".')
    parts: list[tuple[str, bool]] = []
    for i, (role, content) in enumerate(turns):
        end = END_OF_TURN if i + 1 < len(turns) else ""
        text = _turn(template, role, content) + end
        if role == "assistant":
            speaker = template.speakers[role]
            parts += [(speaker, False), (text.removeprefix(speaker), True)]
        else:
            parts.append((text, False))
    return parts


def _turn(template: ChatTemplate, role: str, content: str) -> str:
    return _spoken(template.speakers[role], content.strip() if role == "assistant" else clean(content))


def _spoken(speaker: str, content: str) -> str:
    return f"{speaker} {content}" if speaker and content else speaker + content


def _way_to_think(template: ChatTemplate, think: str | bool | None) -> tuple[str, str]:
    if think is None or think is False:
        return "", ""
    way = "think" if think is True else think
    if way not in template.thinking:
        ways = ", ".join(template.thinking) or "none"
        raise ValueError(f"the chat template {template.name!r} has no way to think named {way!r}; it has: {ways}.")
    return template.thinking[way]


def _check_turns(template: ChatTemplate, turns: list[tuple[str, str]]) -> None:
    if not any(role == "user" for role, _ in turns):
        raise ValueError('a conversation needs a message of the role "user".')
    for role, _ in turns:
        if role not in template.speakers:
            roles = ", ".join(template.speakers)
            raise ValueError(f"the chat template {template.name!r} has no role {role!r}; its roles are {roles}.")


def _with_tools(
    template: ChatTemplate, turns: list[tuple[str, str]], tools: Sequence[str | Mapping[str, Any]]
) -> list[tuple[str, str]]:
    if not template.tools:
        raise ValueError(f"the chat template {template.name!r} has no tools; use g1, or describe them in the text.")
    lines = "\n".join(f"- {tool if isinstance(tool, str) else _signature(tool)}" for tool in tools)
    listed = f"Tools:\n{lines}\nReturn only a JSON function call."
    if turns[0][0] == "system":
        return [("system", f"{clean(turns[0][1])}\n{listed}"), *turns[1:]]
    return [("system", listed), *turns]


def _signature(tool: Mapping[str, Any]) -> str:
    """`name(argument: type, …): description` of OpenAI's description of a function."""
    function = tool.get("function", tool)
    properties = function.get("parameters", {}).get("properties", {})
    arguments = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in properties.items())
    about = clean(function.get("description", "")).replace("\n", " ")
    return f"{function['name']}({arguments})" + (f": {about}" if about else "")
