"""The files for a container and for systemd: what can be said of them without either."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rookery.cli.serve import add_arguments

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "examples" / "serve" / "Containerfile"
UNIT = ROOT / "examples" / "serve" / "rookery.service"


def served(words):
    """What `rookery serve` makes of these words; usage errors raise."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    given, unknown = parser.parse_known_args(words[words.index("serve") + 1 :])
    assert not unknown
    return given


def instructions():
    """(instruction, rest) of the container file, comments and continued lines put together."""
    lines = [line for line in CONTAINER.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def settings():
    """The unit's settings by name."""
    pairs = (line.partition("=") for line in UNIT.read_text("utf-8").splitlines() if not line.startswith("#"))
    return {name: value for name, equals, value in pairs if equals}


def test_the_container_serves_as_nobody_what_the_repository_has():
    found = instructions()
    known = {"FROM", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {name for name, _ in found} == known
    for name, rest in found:
        if name == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    last = dict(found)
    assert int(last["USER"]) > 0
    given = served(json.loads(last["ENTRYPOINT"]))
    assert (given.host, given.port) == ("0.0.0.0", int(last["EXPOSE"]))
    assert given.state_folder == last["VOLUME"]
    (stop,) = map(int, re.findall(r"--stop-timeout (\d+)", CONTAINER.read_text("utf-8")))
    assert given.drain < stop


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_container_is_healthy_while_requests_are_taken(status, code):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        _, program = dict(instructions())["HEALTHCHECK"].split("CMD ", 1)
        _, *words = json.loads(program.replace(":8000/", f":{server.server_port}/"))
        assert subprocess.run([sys.executable, *words], stderr=subprocess.DEVNULL).returncode == code


def test_the_unit_starts_what_there_is_and_gives_it_time_to_drain():
    found = settings()
    given = served(shlex.split(found["ExecStart"]))
    assert given.drain < int(found["TimeoutStopSec"])
    assert given.keys == "%d/" + found["LoadCredential"].partition(":")[0]
    for path in (given.state_folder, *given.models):
        assert path.startswith(f"%S/{found['StateDirectory']}/")
    assert found["DynamicUser"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path):
    program = f"ExecStart={shutil.which('true')} serve"
    text = UNIT.read_text("utf-8").replace("ExecStart=/opt/rookery/bin/rookery serve", program)
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not said, said
