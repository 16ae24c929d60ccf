"""From the shell to the first token: fresh processes of `rookery generate`, beside Python and numpy by themselves.

    python benchmarks/cold_start.py [--model PATH] [--rounds 10] [--save]

Without --model it is the embedded model.
"""

import argparse
import subprocess
import sys

from support import Machine, interleaved, report

NUMPY, BARE = "import numpy", "python alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model file instead of the embedded model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results/")
    args = parser.parse_args()

    model = ["--model", args.model] if args.model else []
    # what the installed `rookery` script does, with this interpreter
    command = "import sys; from rookery.cli.main import main; sys.exit(main())"
    options = ["--max-tokens", "1", "--temperature", "0", *model]
    generate = [sys.executable, "-c", command, "generate", *options, "Once upon"]
    commands = {
        "rookery generate": generate,
        "rookery --help": [sys.executable, "-c", command, "--help"],
        NUMPY: [sys.executable, "-c", NUMPY],
        BARE: [sys.executable, "-c", "pass"],
    }
    calls = {name: lambda words=words: run(words) for name, words in commands.items()}
    seconds = interleaved(calls, rounds=args.rounds)
    rows = [
        {
            "command": name,
            "median s": seconds.median(name),
            "best s": seconds.best(name),
            "times numpy": seconds.ratio(name, NUMPY),
        }
        for name in commands
    ]
    report("cold_start", rows, Machine(threads=Machine(threads=1).cores), save=args.save)


def run(words: list[str]) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())


if __name__ == "__main__":
    main()
