r"""Talk to a model that was trained to. Ctrl-C ends an answer; Ctrl-D, or Ctrl-C at the prompt, ends the talk.

Lines that are piped in are turns, and only the answers go to stdout. A line that ends in \ goes on in the next one, and
all lines between two lines of \"\"\" are one turn. /help lists the commands.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rookery.cli.options import add_model, add_sampling, add_state, interruptions, load_llm, show, text_options
from rookery.errors import RookeryError

HELP = """\
/help            this list
/think [WAY]     how to think before an answer; alone: which ways there are, off: not at all
/rewind [N]      take back the last N turns (1)
/fork [NAME]     go on in a copy of this conversation; /switch comes back
/switch [NAME]   go to another conversation; alone: which there are
/history         what was said
/save FILE       keep the conversation in a file
/load FILE       go on with the one in a file
/state           how much each layer remembers
/reset           forget everything
/exit            leave
A line that begins with // is a turn that begins with /."""
BLOCK = '"""'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="how the model is to behave, said before the first turn")
    parser.add_argument("--template", metavar="NAME", help="form of conversation: g1, world, raven (by file name)")
    parser.add_argument("--think", metavar="WAY", help="let the model think first: think, low, medium, high, fake (g1)")
    add_model(parser)
    add_sampling(parser, max_tokens=1024)
    add_state(parser)


def run(args: argparse.Namespace) -> int:
    if sys.stdin.isatty():
        import contextlib

        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (input() then has a history and can be edited)
    llm = load_llm(args, args.template, preload=True)
    _ = llm.template  # a model that cannot converse says so before the first turn
    chat = Chat(llm, args.system, args.think, text_options(args))
    chat.talks["1"].session = llm.session(args.state)
    while (turn := _next_turn()) is not None and turn != "/exit":
        if turn.startswith("/") and not turn.startswith("//"):
            chat.command(turn)
        else:
            chat.turn(turn.removeprefix("/") if turn.startswith("//") else turn)
    if args.save_state:
        chat.talk.session.save(args.save_state)
    return 0


@dataclass
class Talk:
    """One conversation."""

    session: Any
    turns: list[tuple[str, str, int]] = field(default_factory=list)
    """What was said and answered, and the snapshot from before."""


class Chat:
    """Conversations with one model, and the commands that change them. Answers go to stdout, the rest to stderr."""

    def __init__(self, llm: Any, system: str | None, think: str | None, options: dict[str, Any]) -> None:
        self.llm, self.system, self.think, self.options = llm, system, think, options
        self.talks = {"1": Talk(llm.session())}
        self.name = "1"

    @property
    def talk(self) -> Talk:
        """The conversation that goes on."""
        return self.talks[self.name]

    def turn(self, text: str) -> None:
        """Says something and shows the answer."""
        talk = self.talk
        before = talk.session.keep()
        system = None if before else self.system
        answer = _answer(talk.session.reply(text, system=system, think=self.think, **self.options))
        talk.turns.append((text, answer, before))

    def command(self, line: str) -> None:
        """Does what a line such as "/rewind 2" asks for; what cannot be done is said, and the talk goes on."""
        name, _, argument = line[1:].partition(" ")
        do: Callable[[str], None] | None = getattr(self, f"do_{name}", None)
        try:
            if do is None:
                raise ValueError(f"there is no command /{name}; /help lists them")
            do(argument.strip())
        except (RookeryError, ValueError, OSError) as error:
            _say(str(error))

    def do_help(self, _: str) -> None:
        _say(HELP)

    def do_think(self, way: str) -> None:
        ways = list(self.llm.template.thinking)
        if way and way != "off" and way not in ways:
            raise ValueError(f"there is no way to think named {way!r}; there are: {', '.join([*ways, 'off'])}")
        if way:
            self.think = None if way == "off" else way
        _say(f"thinking: {self.think or 'off'} (of {', '.join([*ways, 'off'])})")

    def do_rewind(self, count: str) -> None:
        turns = int(count or 1) if (count or "1").isdigit() else 0
        if not 1 <= turns <= len(self.talk.turns):
            raise ValueError(f"/rewind takes a number of turns from 1 to {len(self.talk.turns)}, got {count or 1}")
        self.talk.session.rewind(self.talk.turns[-turns][2])
        del self.talk.turns[-turns:]
        _say(f"{len(self.talk.turns)} turns are left")

    def do_fork(self, name: str) -> None:
        name = name or str(len(self.talks) + 1)
        if name in self.talks:
            raise ValueError(f"there is a conversation named {name!r} already; /switch {name} goes there")
        self.talks[name] = Talk(self.talk.session.fork(), list(self.talk.turns))
        _say(f"in {name!r} now, a copy of {self.name!r}")
        self.name = name

    def do_switch(self, name: str) -> None:
        if name and name not in self.talks:
            raise ValueError(f"there is no conversation named {name!r}; there are: {', '.join(self.talks)}")
        self.name = name or self.name
        for other, talk in self.talks.items():
            _say(f"{'>' if other == self.name else ' '} {other}: {len(talk.turns)} turns")

    def do_history(self, _: str) -> None:
        for said, answer, _ in self.talk.turns:
            _say(f"> {said}\n{answer}")

    def do_save(self, path: str) -> None:
        if not path:
            raise ValueError("/save needs the name of a file")
        self.talk.session.save(path)
        _say(f"saved to {path}")

    def do_load(self, path: str) -> None:
        if not path:
            raise ValueError("/load needs the name of a file")
        self.talks[self.name] = Talk(self.llm.session(path))
        _say(f"{self.talk.session.tokens_seen} tokens are in it")

    def do_state(self, _: str) -> None:
        from rookery.engine.picture import picture

        _say(picture(self.talk.session))

    def do_reset(self, _: str) -> None:
        self.talks[self.name] = Talk(self.llm.session())


def _next_turn() -> str | None:
    """The next line, or lines, that say something; None at the end."""
    lines: list[str] = []
    block = False
    while (line := _next_line("... " if lines or block else "> ")) is not None:
        if line.strip() == BLOCK:
            if block:
                break
            block = True
        elif block:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        elif line.strip() or lines:
            lines.append(line)
            break
    text = "\n".join(lines).strip()
    if line is None:
        return text or None
    return text or _next_turn()


def _next_line(prompt: str) -> str | None:
    try:
        return input(prompt) if sys.stdin.isatty() else next(sys.stdin).rstrip("\r\n")
    except (EOFError, StopIteration):
        return None


def _answer(stream: Iterator[str]) -> str:
    pieces: list[str] = []
    with interruptions() as wanted:
        for piece in stream:
            piece = piece if pieces else piece.lstrip()  # the answer begins with the space after "Assistant:"
            if piece:
                pieces.append(piece)
                show(piece)
            if wanted:
                break
    show("\n")
    return "".join(pieces)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
