"""Many prompts from a file, their texts into another, and on again where it stopped. Both hold a JSON object a line.

A prompt's line has "prompt" (text or token ids) or "messages" (for models that converse), and may have the options of
`Session.stream`, "json_schema" or "regex". A text's line has the "index" of its prompt's line, "text", "finish_reason"
and counts; lines come in the order in which texts are done. Half a line that an interruption left is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rookery.engine.scheduler import Generation, Scheduler
from rookery.engine.state_cache import StateCache

if TYPE_CHECKING:
    from rookery.engine.llm import LLM

OWN = ("prompt", "messages", "think", "id", "bos")
"""Keys of a prompt's line that are no options of `Session.stream`."""


def run_batch(
    llm: LLM,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rows: int = 32,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[int, int]]:
    """Writes the text of every prompt in `source` that `destination` does not have yet; yields (done, all) prompts.

    `options` are defaults for lines that do not say otherwise. A prompt's seed is `seed` plus its line's index, so a
    run that was interrupted ends with the same texts as one that was not. Whoever stops iterating loses only the texts
    that were not complete. A prompt that cannot be used gets a line with "error". ValueError for a line that is no JSON
    object.
    """
    lines = _count(source)
    done = _done(Path(destination))
    scheduler = Scheduler(llm, rows=rows, cache=StateCache() if llm.cache is None else llm.cache)
    yield len(done), lines
    waiting: dict[Generation, tuple[int, dict[str, Any]]] = {}
    prompts = ((index, line) for index, line in _lines(source) if index not in done)
    with open(destination, "ab") as file:
        more = True
        while more or waiting:
            # a few more than are worked on, so that prompts are compared with what comes next
            while more and len(waiting) < 2 * rows:
                index, line = next(prompts, (None, None))
                if index is None:
                    more = False
                    break
                try:
                    waiting[_submit(scheduler, line, {"seed": seed + index} | options)] = index, line
                except (ValueError, TypeError, KeyError) as error:
                    _write(file, index, line, {"error": str(error)})
                    done.add(index)
                    yield len(done), lines
            scheduler.tick()
            for generation in [generation for generation in waiting if generation.done]:
                index, line = waiting.pop(generation)
                _write(file, index, line, _result(generation))
                done.add(index)
                yield len(done), lines


def _submit(scheduler: Scheduler, line: dict[str, Any], options: dict[str, Any]) -> Generation:
    llm = scheduler.llm
    given = {key: value for key, value in line.items() if key not in OWN}
    if "messages" in line:
        from rookery.tokenizers.chat import render

        prompt: Any = render(line["messages"], llm.template, line.get("think"))
        stop = given.get("stop", options.get("stop", ()))
        given["stop"] = [*([stop] if isinstance(stop, str) else stop), *llm.template.stops]
    elif "prompt" in line:
        prompt = line["prompt"]
    else:
        raise ValueError('a line needs a "prompt" or "messages"')
    for name in ("json_schema", "regex"):
        if name in given:
            from rookery.engine import grammar

            given["grammar"] = getattr(grammar, name)(given.pop(name))
    ids = llm.tokens_of(prompt)
    return scheduler.submit([0, *ids] if line.get("bos") else ids, **options | given)


def _result(generation: Generation) -> dict[str, Any]:
    try:
        text = generation.text()
    except Exception as error:  # whatever it was, it is this text's alone
        return {"error": str(error)}
    return {
        "text": text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.prompt),
        "tokens": len(generation.tokens),
        "seed": generation.order.seed,
    }


def _write(file: BinaryIO, index: int, line: dict[str, Any], result: dict[str, Any]) -> None:
    known = {"id": line["id"]} if "id" in line else {}
    text = json.dumps({"index": index} | known | result, ensure_ascii=False)
    file.write(text.encode("utf-8", "replace") + b"\n")
    file.flush()


def _count(path: str | os.PathLike[str]) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        index = 0
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {os.fspath(path)!r} is no JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(f"line {number} of {os.fspath(path)!r} is no JSON object")
            yield index, content
            index += 1


def _done(path: Path) -> set[int]:
    """Prompts whose texts are there; half a line at the end is cut off. ValueError for what is no such file."""
    if not path.exists():
        return set()
    done: set[int] = set()
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(int(json.loads(line)["index"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{str(path)!r} exists and holds no texts of `rookery batch`; name another") from None
            whole += len(line)
    if whole < path.stat().st_size:
        if not done and whole == 0 and not path.read_bytes().startswith(b'{"index"'):
            raise ValueError(f"{str(path)!r} exists and holds no texts of `rookery batch`; name another")
        os.truncate(path, whole)
    return done
