"""From OpenAI's conversations to the one text that a model continues, and from its answer back to tool calls."""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rookery.engine.grammar import Grammar, json_or_text, json_schema
from rookery.engine.llm import LLM
from rookery.serve.schema import ApiError, Chat, Message, NamedTool, ResponseFormat, Tool
from rookery.tokenizers.chat import END_OF_TURN, ChatTemplate, render

SCHEMA = 65_536
"""Characters of a schema: a larger one would hold up everybody's next token for seconds."""


class Prompt(NamedTuple):
    """What the model is given."""

    text: str
    stops: tuple[str, ...]
    """An answer ends before these."""
    grammar: Grammar | None = None
    calls: bool = False
    """True if the answer is a function call, or may be one."""


def template_of(llm: LLM) -> ChatTemplate:
    """The model's chat template; ApiError 400 for a model that was not trained to converse."""
    try:
        return llm.template
    except ValueError:
        raise ApiError(
            400,
            "this model was not trained to converse: use /v1/completions, or start the server with --template",
            code="no_chat_template",
        ) from None


def conversation(
    llm: LLM,
    messages: Sequence[Message],
    think: str | None = None,
    *,
    goes_on: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> Prompt:
    """The prompt of a conversation or, where it `goes_on`, what follows one whose last answer the state holds."""
    template = template_of(llm)
    shown = replace(template, opening=()) if goes_on else template
    try:
        text = render([message.turn() for message in messages], shown, think, tools)
    except ValueError as wrong:
        raise ApiError(400, str(wrong), param="tools" if tools else "messages") from None
    return Prompt(END_OF_TURN + text if goes_on else text, template.stops)


def chat_prompt(llm: LLM, asked: Chat, *, goes_on: bool) -> Prompt:
    """The prompt of a chat request, with the form that its tools or its response format ask for."""
    if not asked.tools or asked.tool_choice == "none":
        prompt = conversation(llm, asked.messages, asked.reasoning_effort, goes_on=goes_on)
        return prompt._replace(grammar=form(asked.response_format))
    tools = [tool.model_dump() for tool in chosen(asked.tools, asked.tool_choice)]
    prompt = conversation(llm, asked.messages, asked.reasoning_effort, goes_on=goes_on, tools=tools)
    # after a function's result the model calls again or answers, unless it is made to call
    may_speak = asked.messages[-1].role == "tool" and asked.tool_choice == "auto"
    if may_speak and (grammar := form(asked.response_format)):
        return prompt._replace(grammar=grammar)
    return prompt._replace(grammar=call_grammar(tools, may_speak), calls=True)


def chosen(tools: list[Tool], choice: str | NamedTool) -> list[Tool]:
    """The tools that may be called; ApiError where the one that is named is none of them."""
    if isinstance(choice, str):
        return tools
    named = [tool for tool in tools if tool.function.name == choice.function.name]
    if not named:
        raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")
    return named


def call_grammar(tools: list[dict[str, Any]], may_speak: bool = False) -> Grammar:
    """JSON that calls one of the functions with arguments of its schema; where it `may_speak`, or words."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    try:
        definitions = {str(i): _moved(tool["function"]["parameters"], f"#/$defs/{i}") for i, tool in enumerate(tools)}
    except RecursionError:
        raise ApiError(400, "the schema cannot be used: it is nested too deep", param="tools") from None
    how = json_or_text if may_speak else json_schema
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return _grammar(schema | {"$defs": definitions}, "tools", how)


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to its own parts, when it is a part of another one."""
    if isinstance(schema, dict):
        parts = {key: _moved(value, place) for key, value in schema.items()}
        if isinstance(to := schema.get("$ref"), str) and to.startswith("#"):
            parts["$ref"] = place + to[1:]
        return parts
    return [_moved(part, place) for part in schema] if isinstance(schema, list) else schema


def form(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar of a response format."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return _grammar({"type": "object"}, "response_format")
    if asked.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema.schema", param="response_format")
    return _grammar(asked.json_schema.described, "response_format")


def _grammar(schema: dict[str, Any], param: str, how: Callable[[dict[str, Any]], Grammar] = json_schema) -> Grammar:
    """The grammar of a schema; ApiError for one that is too large to be followed in time, or no schema."""
    try:
        if len(json.dumps(schema)) > SCHEMA:
            raise ValueError(f"a schema takes up to {SCHEMA} characters; this one is longer")
        return how(schema)
    except (ValueError, RecursionError) as wrong:
        raise ApiError(400, f"the schema cannot be used: {str(wrong)[:300]}", param=param) from None


def may_be_call(text: str) -> bool:
    """True for the beginning of an answer that may yet turn out to be a call."""
    return text.startswith(("{", "`"))


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """OpenAI's description of the call in a constrained answer; None where the answer was cut before its end."""
    try:
        call = json.loads(text.strip().removeprefix("```json").removesuffix("```"))
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
        ]
    except (ValueError, KeyError, TypeError):
        return None
