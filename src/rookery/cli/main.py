"""The command line's front: finds the verb, imports its file alone, and turns failures into one line and an exit code.

Exit codes: 0 done, 1 known failure, 2 wrong usage, 130 interrupted. Results go to stdout, everything else to stderr.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "generate": "continue a text",
    "batch": "continue many texts, from a file into a file",
    "chat": "talk to a model that was trained to",
    "serve": "serve models over HTTP, to OpenAI's clients and a browser",
    "train": "train a model from a recipe, or go on where it stopped",
    "finetune": "train a model further: adapters, start states, preferences",
    "distill": "turn a transformer into an RWKV, stage by stage",
    "eval": "measure a model: perplexity and benchmarks",
    "forecast": "forecast a column of a CSV file",
    "imagine": "draw what a text says",
    "classify": "name what pictures show",
    "embed": "find pictures by words, or write vectors of both",
    "recipes": "list the named training runs",
    "data": "turn texts into tokens for training",
    "plot": "draw the curves of training runs",
    "reproduce": "try a paper's claim on this machine",
    "convert": "turn a model file into another format",
    "merge": "put an adapter into the model that it was trained on",
    "state": "tune, measure, shrink and mix start states",
    "compress": "make a model fit into little memory",
    "inspect": "say what a model file is, and what memory it needs",
    "models": "list the models that can be made by name",
    "tokenize": "show or count the tokens of a text",
    "doctor": "what works on this machine, and why the rest does not",
}
"""Verb -> summary; the file of the same name in this folder defines `add_arguments(parser)` and `run(args)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (that of the process by default) and gives its exit code."""
    code = _exit_code(list(sys.argv[1:] if argv is None else argv))
    if argv is None and "LOCAL_RANK" in os.environ:  # torchrun has started this process and others
        # torch's threads may ask for Python's lock while the interpreter shuts down: that aborts, and torchrun would
        # end the others for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_code(argv: list[str]) -> int:
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has closed it, as `| head` does; the interpreter must not fail on it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if "--debug" in argv:
            raise
        print(f"rookery: {describe(error)}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    verb = next((word for word in argv if word not in ("--debug",)), None)
    if verb in VERBS:
        argv.remove(verb)
        return _run(verb, argv)
    parser = _overview()
    if verb is None:
        parser.print_help()
        return 0
    if not verb.startswith("-"):
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        parser.error(f"no verb named {verb!r}.{hint} `rookery --help` lists them.")
    parser.parse_args(argv)
    return 0


def _run(verb: str, argv: list[str]) -> int:
    module = importlib.import_module(f"rookery.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"rookery {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation that works today would forbid a new option tomorrow
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    module.add_arguments(parser)
    code = module.run(parser.parse_args(argv)) or 0
    sys.stdout.flush()  # here, where a closed pipe is still caught
    return code


def _overview() -> argparse.ArgumentParser:
    from rookery import __version__

    lines = "\n".join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="rookery",
        usage="rookery VERB [options]",
        description="Run, train, adapt, compress, convert and serve the RWKV family of sequence models.",
        epilog=f"verbs:\n{lines}\n\n`rookery VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rookery {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def describe(error: Exception) -> str:
    """One line for an error: its message, with its type where the library did not expect it."""
    from rookery.errors import RookeryError

    message = " ".join(str(error).split())
    if isinstance(error, (RookeryError, OSError, ValueError)) and message:
        return message
    return f"{type(error).__name__}: {message or 'no message'} (unexpected; `--debug` shows where)"


if __name__ == "__main__":
    sys.exit(main())
