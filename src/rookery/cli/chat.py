"""Talk to a model that was trained to converse. Ctrl-C ends an answer; Ctrl-D, or Ctrl-C at the prompt, ends the talk.

Lines that are piped in are turns, and only the answers go to stdout. /reset forgets everything, /exit leaves.
"""

import argparse
import sys
from collections.abc import Iterator

from rookery.cli.options import add_model, add_sampling, add_state, interruptions, load_llm, show, text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="how the model is to behave, said before the first turn")
    parser.add_argument("--template", metavar="NAME", help="form of conversation: g1, world, raven (by file name)")
    parser.add_argument("--think", metavar="WAY", help="let the model think first: think, low, medium, high, fake (g1)")
    add_model(parser)
    add_sampling(parser, max_tokens=1024)
    add_state(parser)


def run(args: argparse.Namespace) -> int:
    llm = load_llm(args, args.template)
    _ = llm.template  # a model that cannot converse says so before the first turn
    session = llm.session(args.state)
    system = args.system
    while (turn := _next_turn()) is not None:
        if turn == "/reset":
            session, system = llm.session(), args.system
            continue
        stream = session.reply(turn, system=system, think=args.think, **text_options(args))
        system = None
        _answer(stream)
    if args.save_state:
        session.save(args.save_state)
    return 0


def _next_turn() -> str | None:
    """The next line that says something, or None at the end."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return None
        if line.strip() == "/exit":
            return None
        if line.strip():
            return line.strip()


def _answer(stream: Iterator[str]) -> None:
    began = False
    with interruptions() as wanted:
        for piece in stream:
            piece = piece if began else piece.lstrip()  # the answer begins with the space after "Assistant:"
            began = began or bool(piece)
            show(piece)
            if wanted:
                break
    show("\n")
