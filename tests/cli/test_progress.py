import io
import sys

from rookery.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, times):
    clock = iter(times)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress("MB", 1e6)
    for done in range(1, 4):
        progress(done * 1e6, 4e6, ", fine")
    progress.close()
    return stream.getvalue()


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch):
    text = shown(monkeypatch, Terminal(), [0, 1, 1.01, 2])
    assert text == "\r\x1b[K1.0 of 4.0 MB, 25%, fine\r\x1b[K3.0 of 4.0 MB, 75%, fine, 1 s left\r\x1b[K"


def test_a_pipe_gets_a_plain_line_now_and_then(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), [0, 1, 11, 12]) == "2.0 of 4.0 MB, 50%, fine, 22 s left\n"
