"""Between tokens and text: stop strings that may lie across token borders."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, holding back what may turn out to begin one."""

    def __init__(self, stops: str | Sequence[str]) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self.stops:
            raise ValueError("a stop string is empty; it would stop before the first token")
        self.held = ""
        """Text that is not let through yet: a proper beginning of some stop string."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text to show now, and whether a stop string follows it."""
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
