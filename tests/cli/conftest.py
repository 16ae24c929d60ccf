import io
import sys

import pytest
import torch
from support.language import randomised

from rookery.cli.main import main
from rookery.models import save_model


class Input(io.TextIOWrapper):
    """Standard input: piped bytes, or an empty terminal."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data or b""), encoding="utf-8")
        self.is_terminal = data is None

    def isatty(self):
        return self.is_terminal


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A file with a small random RWKV-7 over bytes."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), path)
    return str(path)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command line in this process: exit code, stdout, stderr. `stdin`: bytes piped in, None a terminal."""

    def run(*argv, stdin=None):
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run
