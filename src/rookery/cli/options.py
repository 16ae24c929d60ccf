"""Options that several verbs share, and what they become in the library."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rookery.engine.llm import LLM

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
)
"""Options that `Sampling` takes under the same name; what is not given keeps the default there."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and what it runs on."""
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="PATH", help="model file, folder or Hub id (the embedded model)")
    group.add_argument("--tokenizer", metavar="NAME", help="world, 20b, bytes, or a vocabulary file (found by itself)")
    group.add_argument("--quantize", metavar="TYPE", help="int8 or int4: smaller weights (the file's precision)")
    group.add_argument("--lean", action="store_true", help="hold no more of a compressed model than tokens need")
    group.add_argument(
        "--preload",
        action=argparse.BooleanOptionalAction,
        help="read all weights into memory first: starts later, then faster (serve, chat and batch do)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads (all cores; one for a small model)")
    group.add_argument("--isa", metavar="NAME", help="force an instruction set, as avx2; `rookery doctor` lists them")
    group.add_argument("--adapter", metavar="FILE", help="merge an adapter of RWKV-PEFT or a folder of peft")
    group.add_argument("--adapter-alpha", type=float, metavar="X", help="alpha of a LoRA whose file does not say it")
    add_settings(group)
    group.add_argument("--device", metavar="NAME", help="run with torch on this device, as cuda")


def add_settings(parser: argparse._ActionsContainer) -> None:
    """What no file tells of a model."""
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="field of the model's config that no file tells, as bits=4; repeatable",
    )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How the text goes on and where it ends."""
    group = parser.add_argument_group("text")
    group.add_argument("-n", "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"at most ({max_tokens})")
    group.add_argument("-t", "--temperature", type=float, metavar="T", help="0: always the likeliest token (1.0)")
    group.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest of so much (0.5)")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among so many at most (0: all)")
    group.add_argument("--min-p", type=float, metavar="P", help="drop what is below this share of the best (0)")
    group.add_argument("--typical-p", type=float, metavar="P", help="keep what is as likely as expected (1: all)")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="against tokens that have occurred (0)")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="the same for each time (0)")
    group.add_argument("--penalty-decay", type=float, metavar="X", help="how slowly occurrences are forgotten (0.996)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (a new one each time)")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text (\n: line end); repeatable",
    )
    group.add_argument("--json-schema", metavar="FILE", help="write JSON that this schema describes")
    group.add_argument("--regex", metavar="PATTERN", help="write text that matches this regular expression")
    group.add_argument("--grammar", metavar="FILE", help="write text of this grammar: Lark, or NAME.gbnf")
    group.add_argument("--speculate", type=int, metavar="N", help="guess up to N tokens at a time; same text, sooner")
    group.add_argument("--draft", metavar="PATH", help="a smaller model that guesses, --speculate tokens at a time (4)")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends a text")


def add_state(parser: argparse.ArgumentParser) -> None:
    """Conversations in files."""
    group = parser.add_argument_group("state")
    group.add_argument("--state", metavar="FILE", help="go on from a saved state, or start from a tuned one")
    group.add_argument("--save-state", metavar="FILE", help="save the state at the end")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """What is known of prompts from earlier runs."""
    group = parser.add_argument_group("cache")
    group.add_argument("--cache", metavar="DIR", help="keep the states of prompts there; no beginning is read twice")
    group.add_argument(
        "--cache-dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="16 bits take half the room, and texts may differ a little (float32: exact)",
    )


@contextmanager
def cached(llm: LLM, args: argparse.Namespace) -> Iterator[None]:
    """Gives the model the cache that the options name, for a time."""
    if args.cache is None:
        yield
        return
    from rookery.engine.state_cache import StateCache

    llm.cache = StateCache(folder=args.cache, dtype=args.cache_dtype)
    try:
        yield
    finally:
        llm.cache.close()


def load_llm(args: argparse.Namespace, template: str | None = None, *, preload: bool = False) -> LLM:
    """The model that the options name; `preload` is what is done where they do not say."""
    from rookery.engine.llm import LLM

    return LLM(
        args.model,
        quantize=args.quantize,
        lean=args.lean,
        preload=preload if args.preload is None else args.preload,
        threads=args.threads,
        isa=args.isa,
        device=args.device,
        tokenizer=args.tokenizer,
        template=template,
        adapter=args.adapter,
        adapter_alpha=args.adapter_alpha,
        settings=dict(args.setting),
    )


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Session.stream`."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    stops = [stop.replace(r"\n", "\n").replace(r"\t", "\t") for stop in args.stop]
    if args.json_schema or args.regex or args.grammar:
        from rookery.engine.grammar import read_grammar

        given["grammar"] = read_grammar(args.json_schema, args.regex, args.grammar)
    if args.draft:
        from rookery.engine.llm import LLM
        from rookery.engine.speculate import DraftModel

        given["speculate"] = DraftModel(LLM(args.draft, threads=args.threads), args.speculate or 4)
    elif args.speculate:
        given["speculate"] = args.speculate
    if getattr(args, "logprobs", None) is not None:
        given["logprobs"] = args.logprobs
    return given | {"max_tokens": args.max_tokens, "seed": args.seed, "ignore_eos": args.ignore_eos, "stop": stops}


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it, so that a session is never left between two tokens."""
    wanted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: wanted.append(number))
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGINT, before)


def read_stdin() -> str:
    """All of stdin as text, without the line end that `echo` adds."""
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"what came on stdin is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def show(text: str) -> None:
    """Writes a piece of a result at once; what the terminal cannot show becomes a question mark."""
    stream = sys.stdout
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
