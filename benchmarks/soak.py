"""Random requests, cancellations, forks, snapshots and saved files for some minutes: what does memory do?

    python benchmarks/soak.py [--minutes 10] [--model FILE] [--rows 32] [--seed 1] [--save]

Reports requests, tokens, errors, and the slope of the process' memory over the second half of the run, in MB a minute
with its standard error. Some texts that were not cancelled are written once more by themselves and compared.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from serving_engine import resident
from support import Machine, report

from rookery import LLM
from rookery.engine.scheduler import Generation, Scheduler
from rookery.engine.session import Session
from rookery.engine.state_cache import StateCache

CHECKED = 0.02
"""Share of the whole texts that are compared with the ones that they are alone."""


class Soak:
    """Makes trouble for a scheduler that runs in its own thread."""

    def __init__(self, llm: LLM, scheduler: Scheduler, folder: Path, seed: int) -> None:
        self.llm, self.scheduler, self.folder, self.draw = llm, scheduler, folder, random.Random(seed)
        self.open: list[Generation] = []
        self.kept: list[Session] = []
        vocab = llm.runner.config.vocab_size
        self.systems = [[self.draw.randrange(1, vocab) for _ in range(200)] for _ in range(4)]
        self.counts = dict.fromkeys(("requests", "cancelled", "forks", "saves", "errors", "checked", "wrong"), 0)

    def act(self) -> None:
        """One random thing."""
        action = self.draw.random()
        if action < 0.5 and len(self.open) < 3 * self.scheduler.rows:
            self.request()
        elif action < 0.6 and self.open:
            self.draw.choice(self.open).cancel()
        elif action < 0.7 and self.kept:
            self.request(self.draw.choice(self.kept).fork())
            self.counts["forks"] += 1
        elif action < 0.8 and self.kept:
            path = self.folder / f"{self.draw.randrange(20)}.state"
            self.draw.choice(self.kept).save(path)
            self.kept[self.draw.randrange(len(self.kept))] = self.llm.session(path)
            self.counts["saves"] += 1
        self.collect()

    def request(self, session: Session | None = None) -> None:
        vocab = self.llm.runner.config.vocab_size
        prompt = [self.draw.randrange(1, vocab) for _ in range(self.draw.randint(1, 100))]
        if session is None and self.draw.random() < 0.5:
            prompt = self.draw.choice(self.systems) + prompt
        options = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": self.draw.choice([0, 0.3]), "ignore_eos": True}
        seed, length = self.draw.randrange(1 << 30), self.draw.randint(1, 80)
        text = self.scheduler.submit(prompt, length, session=session, seed=seed, **options)
        text.options, text.alone = options, session is None
        self.open.append(text)
        self.counts["requests"] += 1

    def collect(self) -> None:
        for text in [text for text in self.open if text.done]:
            self.open.remove(text)
            self.counts["errors"] += text.error is not None
            self.counts["cancelled"] += text.finish_reason == "closed"
            if text.finish_reason == "length" and text.alone and self.draw.random() < CHECKED:
                self.check(text)
            if text.session is not None and text.error is None and text.session.tokens_seen:
                self.kept.append(text.session)
                del self.kept[:-20]

    def check(self, text: Generation) -> None:
        session = self.llm.session()
        session.feed(text.prompt)
        stream = session.stream(text.order.max_tokens, seed=text.order.seed, **text.options)
        list(stream)
        self.counts["checked"] += 1
        self.counts["wrong"] += stream.tokens != text.tokens


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Units a minute, and its standard error, of the straight line through the second half of the points."""
    half = len(times) // 2
    x, y = np.array(times[half:]) / 60, np.array(values[half:])
    x = x - x.mean()
    steepness = float((x * y).sum() / (x**2).sum())
    rest = y - y.mean() - steepness * x
    return steepness, float(np.sqrt((rest**2).sum() / max(1, len(x) - 2) / (x**2).sum()))


def soak(given: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    times, values, started = [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = StateCache(64 << 20, folder=Path(folder) / "cache", disk_budget=256 << 20)
        (Path(folder) / "states").mkdir()
        with Scheduler(llm, rows=given.rows, cache=cache) as scheduler:
            work = Soak(llm, scheduler, Path(folder) / "states", given.seed)
            while (now := time.perf_counter() - started) < 60 * given.minutes:
                work.act()
                if not times or now - times[-1] >= 1:
                    times.append(now)
                    values.append(resident() / 1e6)
                    print(f"\r{now:5.0f} s  {values[-1]:8.1f} MB  {work.counts}", end="", flush=True)
                time.sleep(0.002)
        print()
        tokens = scheduler.counts["tokens"]
    rate, error = slope(times, values)
    return {
        "minutes": given.minutes,
        **work.counts,
        "tokens/s": tokens / (60 * given.minutes),
        "MB at half": values[len(values) // 2],
        "MB at the end": values[-1],
        "MB a minute": rate,
        "standard error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    llm = LLM(given.model, threads=given.threads)
    report("soak", [soak(given, llm)], Machine(threads=llm.runner.threads), save=given.save)


if __name__ == "__main__":
    main()
