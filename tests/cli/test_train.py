"""`rookery train`: it is true that …"""

import os

import pytest

from rookery.cli.main import main


@pytest.mark.parametrize(
    ("set_before", "found"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
    ids=["nothing set", "a count set", "a policy set"],
)
def test_threads_of_openmp_do_not_spin_long_unless_the_user_wants_them_to(monkeypatch, capsys, set_before, found):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny-test", "--dry-run"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == found
    assert "tiny-test" in capsys.readouterr().out
