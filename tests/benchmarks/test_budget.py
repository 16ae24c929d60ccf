"""The budget counts what it says it counts."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "budget.py"


@pytest.fixture(scope="module")
def budget():
    spec = importlib.util.spec_from_file_location("budget", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seconds_are_summed_by_folder(budget):
    report = ElementTree.fromstring(
        "<testsuites><testsuite>"
        '<testcase classname="tests.ops.test_a" name="x" time="1.5"/>'
        '<testcase classname="tests.ops.test_b" name="y" time="1.0"/>'
        '<testcase classname="tests.test_c" name="z" time="4.0"/>'
        "</testsuite></testsuites>"
    )
    assert budget.seconds_by_folder(report) == [(4.0, "tests"), (2.5, "tests/ops"), (6.5, "all")]
    assert budget.slowest(report, 1) == [(4.0, "tests.test_c::z")]


def test_a_function_is_as_long_as_its_code(budget, tmp_path):
    path = tmp_path / "some.py"
    path.write_text('def long():\n    """Two\n    lines."""\n    a = 1\n    return a\n\n\ndef short():\n    return 2\n')
    assert budget.longest_functions([path]) == [(3, "some.py:1 long"), (2, "some.py:8 short")]
    assert budget.longest_files([path]) == [(9, "some.py")]


def test_what_runs_models_with_torch_is_not_torch_free(budget):
    modules = budget.torch_free_modules()
    assert "rookery.checkpoints.state_file" in modules
    assert not [name for name in modules if name.startswith("rookery.engine.runners.torch")]
    assert len(modules) == len(set(modules))
