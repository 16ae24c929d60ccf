"""Descriptions of pictures out of what is known of them: text from the web, a caption, tags (RWKV-CLIP, section 3.1).

`TemplateFuser` puts them together by rule, `LLMFuser` asks a language model behind any endpoint of OpenAI's protocol.
What says more than the three together do is dropped by `problem_with`.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rookery.checkpoints.atomic import replacing
from rookery.data.captions import texts_of
from rookery.errors import RookeryError

PROMPT = """Describe a picture in one sentence of at most {words} words, for someone who cannot see it.
Text found beside it: {raw}
What a captioning model wrote: {synthetic}
Objects that were detected: {tags}
Name only objects that the caption or the detected objects support. Keep names and places of the text that fit them.
Leave out advertising, file names and dates. Answer with the sentence alone."""
_COMMON = """
all and any are but can for had has her his its new not off old one out red six ten the two was who you blue four
five green about above across after against along also among another around away back background behind below
beside between beyond both bright close color colorful coloured colour covered dark different down each featuring
filled front full group hanging holding image including inside into large left light like little long looking lying
many middle more near next night only open outside over part people person photo photograph picture placed right
scene several shaped showing shown shows side sitting small some stand standing surrounded that their them there
these they this three through together top toward towards under upon various very view visible walking wearing
where which while with within without white black
"""
COMMON = frozenset(_COMMON.split())
"""Words of descriptions that name no object."""


class GenerationFailed(RookeryError, RuntimeError):
    """The language model gave no answer."""


class Fuser(Protocol):
    """Makes one description of a text from the web, a caption and tags, any of them empty."""

    def __call__(self, raw: str, synthetic: str, tags: Sequence[str]) -> str: ...


class TemplateFuser:
    """By rule: the text from the web, cleaned, the caption, then tags that neither mentions."""

    def __call__(self, raw: str, synthetic: str, tags: Sequence[str]) -> str:
        """The description; the same for the same inputs."""
        parts = [part.rstrip(" .") for part in (cleaned(raw), cleaned(synthetic)) if part]
        if len(parts) == 2 and parts[0].lower() == parts[1].lower():
            parts.pop()
        said = stems(" ".join(parts))
        unsaid = [tag for tag in dict.fromkeys(tags) if not stems(tag) <= said]
        if unsaid:
            parts.append("with " + ", ".join(unsaid) if parts else ", ".join(unsaid))
        return ", ".join(parts)


class LLMFuser:
    """By a language model: `ask` takes a prompt and gives an answer."""

    def __init__(self, ask: Callable[[str], str], words: int = 60) -> None:
        self.ask, self.words = ask, words

    def __call__(self, raw: str, synthetic: str, tags: Sequence[str]) -> str:
        """The first line of the answer, without quotes."""
        given = {"raw": cleaned(raw) or "none", "synthetic": synthetic or "none", "tags": ", ".join(tags) or "none"}
        answer = self.ask(PROMPT.format(words=self.words, **given)).strip()
        return answer.splitlines()[0].strip(" \"'“”") if answer else ""


def endpoint(url: str, model: str, key: str = "", *, timeout: float = 60.0, tries: int = 3) -> Callable[[str], str]:
    """Asks a server of OpenAI's protocol, `url` ending in /v1. GenerationFailed after `tries` failures in a row."""

    def ask(prompt: str) -> str:
        message = {"model": model, "temperature": 0.7, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(
            url.rstrip("/") + "/chat/completions", json.dumps(message).encode("utf-8"), headers
        )
        for attempt in range(1, tries + 1):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    return json.load(answer)["choices"][0]["message"]["content"] or ""
            except (OSError, ValueError, LookupError, TypeError) as problem:
                lasting = isinstance(problem, urllib.error.HTTPError) and problem.code < 500 and problem.code != 429
                if attempt == tries or lasting:
                    raise GenerationFailed(f"{url} gave no description ({problem}); is the server up?") from None
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    return ask


def cleaned(text: str) -> str:
    """A text from the web without addresses, file names, hash signs and repeated spaces."""
    text = re.sub(r"https?://\S+|www\.\S+|\b\S+\.(?:jpe?g|png|gif|webp|tiff?)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(re.sub(r"[#_|]+", " ", text).split())


def stems(text: str) -> set[str]:
    """The beginnings of the words that may name something: those of three letters or more, but the common ones."""
    words = re.findall(r"[^\W\d_]{3,}", text.lower())
    return {word[:5].rstrip("s") for word in words if word not in COMMON}


def problem_with(description: str, raw: str, synthetic: str, tags: Sequence[str], invented: float = 0.3) -> str | None:
    """Why a description is not kept, or None: "empty", "long" (three times its inputs), or "invented", where more than
    that share of its words that may name something appear in no input.

    Words are compared by their beginnings, not by a parser: a guard against the worst, not a judgement.
    """
    if not description.strip():
        return "empty"
    given = " ".join([raw, synthetic, *tags])
    if len(description) > 3 * len(given):
        return "long"
    said, known = stems(description), stems(given)
    unknown = [stem for stem in said if not any(stem.startswith(k[:4]) or k.startswith(stem[:4]) for k in known)]
    return "invented" if said and len(unknown) / len(said) > invented else None


def describe_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fuse: Fuser,
    say: Callable[[str], None] = lambda text: None,
) -> Counter:
    """Writes `source`, a JSONL of pairs, to `out` with a "generated" text a row, where one is kept.

    Gives how many rows were "kept", "empty", "long", "invented" or had "nothing" to describe. A line that is no JSON is
    a ValueError with its number; the file is whole or absent.
    """
    counts: Counter = Counter()
    with (
        replacing(out) as temporary,
        Path(source).open(encoding="utf-8") as lines,
        temporary.open("w", encoding="utf-8") as written,
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise ValueError(f"{source}, line {number} is not JSON: {problem}") from None
            counts[_describe(row, fuse)] += 1
            written.write(json.dumps(row, ensure_ascii=False) + "\n")
            if number % 1000 == 0:
                say(f"{number:,} rows, {counts['kept']:,} descriptions kept")
    return counts


def _describe(row: dict, fuse: Fuser) -> str:
    texts: Mapping = texts_of(row)
    given = texts.get("raw", ""), texts.get("synthetic", ""), texts.get("tags", ())
    if not any(given):
        return "nothing"
    description = fuse(*given)
    if reason := problem_with(description, *given):
        return reason
    row["generated"] = description
    return "kept"
