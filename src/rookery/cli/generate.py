"""Continue a text. The continuation goes to stdout as it is made; without PROMPT the text is read from stdin."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rookery.cli.options import (
    add_cache,
    add_model,
    add_sampling,
    add_state,
    cached,
    interruptions,
    load_llm,
    read_stdin,
    show,
    text_options,
)

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.session import Session
    from rookery.engine.stream import TextStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - reads it from stdin")
    parser.add_argument(
        "--file", metavar="FILE", help="text of any length to read before PROMPT; Ctrl-C saves the state"
    )
    parser.add_argument("--echo", action="store_true", help="show the prompt, too")
    parser.add_argument("--bos", action="store_true", help="begin with token 0")
    parser.add_argument("--json", action="store_true", help="one JSON object when all is done")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log probabilities, and N other tokens'")
    add_model(parser)
    add_sampling(parser, max_tokens=256)
    add_state(parser)
    add_cache(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    if prompt is None:
        print("rookery generate: no prompt; give one, or pipe it in (see --help)", file=sys.stderr)
        return 2
    llm = load_llm(args)
    tokens = ([0] if args.bos else []) + llm.tokens_of(prompt)
    if args.file:
        session = _read(args, llm)
        if session is None:
            return 130
    else:
        session = llm.session(args.state)
    if args.cache and not (args.file or args.state):
        from rookery.engine.state_cache import read_prompt

        with cached(llm, args):
            session = read_prompt(llm, tokens, llm.cache)
    else:
        session.feed(tokens)
    started = time.perf_counter()
    stream = session.stream(**text_options(args))
    if args.json:
        text = "".join(stream) + stream.unfinished()
        show(json.dumps(_summary(prompt, tokens, text, stream, started), ensure_ascii=False) + "\n")
    elif not _show(args, prompt, stream):
        session.save(args.save_state)
        print(f"interrupted; --state {args.save_state} goes on", file=sys.stderr)
        return 130
    if args.save_state:
        session.save(args.save_state)
    return 0


def _read(args: argparse.Namespace, llm: LLM) -> Session | None:
    """The session that has read `--file`; None where it was interrupted and waits in a file."""
    from rookery.cli.progress import Progress
    from rookery.engine.reading import load_reading, read_file, save_reading

    session, start = load_reading(llm, args.state) if args.state else (llm.session(), None)
    progress, place = Progress("MB", 1e6), start
    with interruptions() as wanted:
        for place in read_file(session, args.file, start):
            progress(place.offset, place.size, f", {session.tokens_seen:,} tokens")
            if wanted:
                break
    progress.close()
    if not wanted:
        return session
    if place is None:  # of an empty file there is nothing to keep
        raise KeyboardInterrupt
    path = args.save_state or Path(args.file).name + ".state"
    save_reading(session, path, place)
    print(
        f"interrupted after {session.tokens_seen:,} tokens; --file {args.file} --state {path} goes on", file=sys.stderr
    )
    return None


def _show(args: argparse.Namespace, prompt: str, stream: TextStream) -> bool:
    """Shows the text as it is made; False where it was interrupted and is to be saved."""
    # without a file to save to, Ctrl-C need not wait for the end of a step
    with interruptions() if args.save_state else nullcontext([]) as wanted:
        try:
            if args.echo:
                show(prompt)
            for piece in stream:
                show(piece)
                if wanted:
                    return False
            show(stream.unfinished())
        finally:  # an interrupted text ends its line, too
            show("\n")
    return True


def _summary(prompt: str, tokens: list[int], text: str, stream: TextStream, started: float) -> dict[str, Any]:
    summary = {
        "prompt": prompt,
        "text": text,
        "finish_reason": stream.finish_reason,
        "prompt_tokens": len(tokens),
        "tokens": len(stream.tokens),
        "seed": stream.seed,
        "seconds": round(time.perf_counter() - started, 6),
    }
    if stream.logprobs:
        summary["logprobs"] = [told._asdict() for told in stream.logprobs]
    return summary


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt given or piped in; empty where there is something else to go on from; None where nothing is."""
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if args.prompt is None and (args.state or args.bos or args.file):
        return ""
    return None if args.prompt is None and sys.stdin.isatty() else read_stdin()
