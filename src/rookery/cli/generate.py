"""Continue a text. The continuation goes to stdout as it is made; without PROMPT the text is read from stdin."""

import argparse
import json
import sys
import time

from rookery.cli.options import add_model, add_sampling, add_state, load_llm, read_stdin, show, text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - reads it from stdin")
    parser.add_argument("--echo", action="store_true", help="show the prompt, too")
    parser.add_argument("--bos", action="store_true", help="begin with token 0")
    parser.add_argument("--json", action="store_true", help="one JSON object when all is done")
    add_model(parser)
    add_sampling(parser, max_tokens=256)
    add_state(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    if prompt is None:
        print("rookery generate: no prompt; give one, or pipe it in (see --help)", file=sys.stderr)
        return 2
    llm = load_llm(args)
    session = llm.session(args.state)
    tokens = ([0] if args.bos else []) + llm.tokens_of(prompt)
    session.feed(tokens)
    started = time.perf_counter()
    stream = session.stream(**text_options(args))
    if args.json:
        text = "".join(stream) + stream.unfinished()
        summary = {
            "prompt": prompt,
            "text": text,
            "finish_reason": stream.finish_reason,
            "prompt_tokens": len(tokens),
            "tokens": len(stream.tokens),
            "seed": stream.seed,
            "seconds": round(time.perf_counter() - started, 6),
        }
        show(json.dumps(summary, ensure_ascii=False) + "\n")
    else:
        try:
            if args.echo:
                show(prompt)
            for piece in stream:
                show(piece)
            show(stream.unfinished())
        finally:  # an interrupted text ends its line, too
            show("\n")
    if args.save_state:
        session.save(args.save_state)
    return 0


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt given or piped in; empty where a state or token 0 is there to go on from; None where nothing is."""
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if args.prompt is None and (args.state or args.bos):
        return ""
    return None if args.prompt is None and sys.stdin.isatty() else read_stdin()
