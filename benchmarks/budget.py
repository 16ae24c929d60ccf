"""Where the repository's time and size go: seconds per test folder, import times, longest files and functions.

    python benchmarks/budget.py [--no-tests]

Import times are the medians of fresh processes on this machine, with that of an empty program taken off.
"""

import argparse
import ast
import pkgutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH_FREE = ("errors", "registry", "families", "tokenizers", "checkpoints", "engine", "cli")
"""Modules and packages of rookery that run without torch; every module in them is measured."""
FILE_LIMIT, FUNCTION_LIMIT = 600, 45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true", help="leave out the slowest part")
    if not parser.parse_args().no_tests:
        report = run_tests()
        table("seconds of testing, by folder", "seconds", seconds_by_folder(report))
        table("slowest tests", "seconds", slowest(report, 10))
    table("milliseconds to import", "ms", import_times(["numpy", *torch_free_modules()])[:15])
    sources = [ROOT / name for name in tracked("*.py", "*.cpp", "*.hpp")]
    table(f"longest files (limit {FILE_LIMIT})", "lines", longest_files(sources)[:10])
    functions = longest_functions(path for path in sources if path.suffix == ".py")
    table(f"longest functions (limit {FUNCTION_LIMIT})", "lines", functions[:10])


def run_tests() -> ElementTree.Element:
    """The JUnit report of the whole suite, run in one process; the summary goes to the standard error."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout[-2000:], file=sys.stderr)
        if not report.exists():
            sys.exit("pytest wrote no report; its output is above")
        return ElementTree.parse(report).getroot()


def seconds_by_folder(report: ElementTree.Element) -> list[tuple[float, str]]:
    """Seconds and folder, the slowest first, and their sum."""
    spent: Counter[str] = Counter()
    for case in report.iter("testcase"):
        folder = case.get("classname", "").replace(".", "/").rpartition("/")[0]
        spent[folder or "tests"] += float(case.get("time", 0))
    rows = [(seconds, folder) for folder, seconds in spent.most_common()]
    return [*rows, (sum(spent.values()), "all")]


def slowest(report: ElementTree.Element, count: int) -> list[tuple[float, str]]:
    """Seconds and name of the slowest tests."""
    cases = [
        (float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in report.iter("testcase")
    ]
    return sorted(cases, reverse=True)[:count]


def torch_free_modules() -> list[str]:
    """Every module that must not need torch; the runner of torch models is the one exception."""
    found = []
    for name in TORCH_FREE:
        found.append(f"rookery.{name}")
        folder = ROOT / "src" / "rookery" / name
        if folder.is_dir():
            found += [module.name for module in pkgutil.walk_packages([str(folder)], f"rookery.{name}.")]
    return [name for name in found if not name.startswith("rookery.engine.runners.torch")]


def import_times(modules: Sequence[str], repeats: int = 3) -> list[tuple[float, str]]:
    """Milliseconds and module, the slowest first; repeats are interleaved, so that a busy minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in ("", *modules)}
    for _ in range(repeats):
        for name, measured in times.items():
            begun = time.perf_counter()
            code = f"import {name}" if name else ""
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "src")
            measured.append(time.perf_counter() - begun)
    nothing = statistics.median(times.pop(""))
    rows = [(1000 * (statistics.median(measured) - nothing), name) for name, measured in times.items()]
    return sorted(rows, reverse=True)


def tracked(*patterns: str) -> list[str]:
    """Names of the repository's files that match."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def longest_files(paths: Iterable[Path]) -> list[tuple[float, str]]:
    """Lines and name, the longest first."""
    return sorted(((len(path.read_text("utf-8").splitlines()), shown(path)) for path in paths), reverse=True)


def longest_functions(paths: Iterable[Path]) -> list[tuple[float, str]]:
    """Lines of code (the docstring is not counted) and name of Python functions, the longest first."""
    rows = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                rows.append((lines_of(node), f"{shown(path)}:{node.lineno} {node.name}"))
    return sorted(rows, reverse=True)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    whole = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return whole
    docstring = function.body[0]
    return whole - (docstring.end_lineno - docstring.lineno + 1)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def table(title: str, unit: str, rows: Iterable[tuple[float, str]]) -> None:
    print(f"\n{title}\n{unit:>9}")
    for value, name in rows:
        print(f"{value:9.1f}  {name}" if isinstance(value, float) else f"{value:9}  {name}")


if __name__ == "__main__":
    main()
