"""Conversations and texts for fine-tuning, from JSON files, as tokens with a mask of what is learned.

Known records (adaptation.md C.4.3): {"text"}, Alpaca's {"instruction", "input", "output"}, pairs such as {"prompt",
"response"} or {"question", "answer"}, OpenAI's {"messages"}, ShareGPT's {"conversations"}. Pairs of answers to prefer
and to avoid add "chosen" and "rejected" to any record that ends in a prompt.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rookery.data.binidx import BinIdx, is_binidx
from rookery.data.documents import DATASET, dataset_rows, parquet_rows
from rookery.tokenizers.base import Tokenizer
from rookery.tokenizers.chat import spoken_parts

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "response"))
"""Keys of a request and its answer."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that files give to the roles, where they differ from ours."""
Mask = Literal["assistant", "qa", "none"]
"""What is learned: the answers; the answers of a `text` with "User:" and "Assistant:" in it; everything."""


@dataclass(frozen=True)
class Sample:
    """One document."""

    tokens: np.ndarray
    """int64 [n]"""
    learned: np.ndarray
    """bool [n]: tokens that the model is to predict; the first never is, nothing stands before it."""


def read_records(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (for messages) and content of every record.

    Records are the lines of a .jsonl, the elements of the list in a .json, the rows of a .parquet or, for "hf:NAME" as
    in `rookery.data.documents`, of a data set of the Hub. Any other file is one record, its whole text.
    """
    if str(source).startswith(DATASET):
        rows = dataset_rows(str(source).removeprefix(DATASET))
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {str(path)!r}")
    if path.suffix == ".parquet":
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(parquet_rows(path), 1))
        return
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError(f"{path} holds one {type(content).__name__}, expected a list of records")
        for number, record in enumerate(content, 1):
            yield (place := f"{path}, record {number}"), _record(record, place)
        return
    if path.suffix != ".jsonl":
        yield str(path), {"text": path.read_text(encoding="utf-8")}
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                content = json.loads(line)
            except ValueError:
                raise ValueError(f"{place}: not JSON") from None
            yield place, _record(content, place)


def _record(content: Any, place: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"text": content}
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(content).__name__}")
    return content


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The turns of a record, with our names of the roles; None for a plain `text`. ValueError for an unknown form."""
    if "messages" in record or "conversations" in record:
        turns = record.get("messages") or record["conversations"]
        messages = [_message(turn) for turn in turns]
        if isinstance(record.get("system"), str) and record["system"]:
            messages.insert(0, {"role": "system", "content": record["system"]})
        return messages
    if "instruction" in record and "output" in record:
        asked = "\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
        return [*_history(record), _user(asked), {"role": "assistant", "content": record["output"]}]
    for question, answer in PAIRS:
        if question in record and answer in record:
            return [_user(record[question]), {"role": "assistant", "content": record[answer]}]
    if isinstance(record.get("text"), str):
        return None
    raise ValueError(
        f"a record with the keys {', '.join(sorted(record)) or '(none)'} is of no known form; known are text, "
        "messages, conversations, instruction with output, and prompt with response"
    )


def _history(record: Mapping[str, Any]) -> list[dict[str, str]]:
    before = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for asked, answer in record.get("history") or []:
        before += [_user(asked), {"role": "assistant", "content": answer}]
    return before


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a turn needs a role and a text, got the keys {', '.join(sorted(turn)) or '(none)'}")
    return {"role": ROLES.get(role, role), "content": content}


def parts_of(record: Mapping[str, Any], template: str, mask: Mask = "assistant") -> list[tuple[str, bool]]:
    """The record's text in pieces, each with whether it is learned."""
    messages = messages_of(record)
    if messages is not None:
        parts = spoken_parts(messages, template)
    else:
        parts = _answers_in(record["text"]) if mask == "qa" else [(record["text"], True)]
    return [(text, True) for text, _ in parts] if mask == "none" else parts


def _answers_in(text: str) -> list[tuple[str, bool]]:
    """Splits behind every "Assistant:" that begins a turn and before the speaker that follows."""
    speaker = r"(?:(?<=\n\n)|\A)(?:User|Assistant|System|Human|Bot|Question|Answer):"
    parts: list[tuple[str, bool]] = []
    end, says = 0, False
    for found in re.finditer(speaker, text):
        parts.append((text[end : found.start()], says))
        parts.append((found.group(), False))
        end, says = found.end(), found.group() in ("Assistant:", "Bot:", "Answer:")
    parts.append((text[end:], says))
    return [(piece, learned) for piece, learned in parts if piece]


def encode(parts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> Sample:
    """Tokens of the pieces' whole text and the one that ends a text, which is learned with the last answer.

    The text is tokenised in one, as the model will meet it; a token that straddles a border is learned if any part of
    it is (state_methods.md 1.9, oracle 10).
    """
    pieces = [text.encode() for text, _ in parts]
    tokens = tokenizer.encode(b"".join(pieces).decode())
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens])
    borders = np.cumsum([len(piece) for piece in pieces])
    if len(ends) and ends[-1] != borders[-1]:
        # the tokenizer changes the text (Unicode normalisation): places in it mean nothing then
        encoded = [tokenizer.encode(text) for text, _ in parts]
        learned = [flag for ids, (_, flag) in zip(encoded, parts) for _ in ids]
        tokens = [token for ids in encoded for token in ids]
    else:
        wanted = np.repeat([flag for _, flag in parts], [len(piece) for piece in pieces])
        before = np.concatenate([[0], np.cumsum(wanted)])
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        learned = list(before[ends] > before[starts]) if len(ends) else []
    flags = np.array([*learned, parts[-1][1]], dtype=bool)
    flags[0] = False
    return Sample(np.array([*tokens, tokenizer.eos_id], dtype=np.int64), flags)


def read_samples(paths: str, tokenizer: Tokenizer, template: str, mask: Mask = "assistant") -> list[Sample]:
    """The samples of files separated by commas. ValueError names the place of a record that cannot be read.

    Documents of a binidx data set (`rookery data build`) are texts, learned whole.
    """
    samples = []
    for path in filter(None, paths.split(",")):
        if is_binidx(path):
            samples += _tokens(path, tokenizer)
            continue
        for place, record in read_records(path):
            try:
                samples.append(encode(parts_of(record, template, mask), tokenizer))
            except (ValueError, TypeError, AttributeError) as wrong:
                raise ValueError(f"{place}: {wrong}") from None
    if not samples:
        raise ValueError(f"there are no records in {paths!r}")
    return samples


def _tokens(path: str, tokenizer: Tokenizer) -> list[Sample]:
    found = []
    for document in BinIdx(path):
        tokens = document.astype(np.int64)
        if len(tokens) and tokens.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} holds the token {tokens.max()}, the tokenizer has {tokenizer.vocab_size}; "
                "give the one it was made with"
            )
        found.append(Sample(tokens, np.arange(len(tokens)) > 0))
    return found


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer to prefer and the one to avoid."""

    chosen: Sample
    rejected: Sample


def read_preferences(paths: str, tokenizer: Tokenizer, template: str) -> list[Preference]:
    """The pairs of files separated by commas: records with a prompt, "chosen" and "rejected"."""
    pairs = []
    for path in filter(None, paths.split(",")):
        for place, record in read_records(path):
            try:
                turns = [_answered(record, key) for key in ANSWERS]
                pair = Preference(*(encode(spoken_parts(messages, template), tokenizer) for messages in turns))
            except (ValueError, TypeError, AttributeError) as wrong:
                raise ValueError(f"{place}: {wrong}") from None
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"there are no records in {paths!r}")
    return pairs


ANSWERS = ("chosen", "rejected")


def _answered(record: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    if key not in record:
        raise ValueError(f'a preference needs "chosen" and "rejected", got the keys {", ".join(sorted(record))}')
    answer = record[key]
    if isinstance(answer, list):  # whole conversations
        return [_message(turn) for turn in answer]
    last = {"role": "assistant", "content": answer} if isinstance(answer, str) else _message(answer)
    if "prompt" in record or "question" in record or "instruction" in record:
        asked = record.get("prompt") or record.get("question") or record["instruction"]
        if isinstance(asked, list):
            return [*map(_message, asked), last]
        return [_user("\n".join(part for part in (asked, record.get("input", "")) if part)), last]
    return [*(messages_of({k: v for k, v in record.items() if k not in ANSWERS}) or ()), last]
