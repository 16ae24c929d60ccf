"""Series to learn forecasting from before seeing any real one: seasons, trends, steps, noise and random walks.

Mixtures of this kind carry over to real data (Chronos, arXiv 2403.07815, 4.2; ForecastPFN, arXiv 2311.01933); the
generator is our own.
"""

from collections.abc import Iterator

import numpy as np

PERIODS = (4, 6, 7, 12, 24, 24, 24, 48, 52, 96, 168)
"""Points of a season: quarters, weeks, months, days and weeks of hours; a day of hours comes most often."""


def synthetic_series(count: int, length: int, seed: int, step: int) -> np.ndarray:
    """float32 [count, length]: a pure function of `seed` and `step`, so that a run can be taken up anywhere."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=step))
    t = np.arange(length)
    return np.stack([_series(rng, t) for _ in range(count)]).astype(np.float32)


def _series(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    base = _level(rng, t)
    season = sum((_season(rng, t, period) for period in rng.choice(PERIODS, rng.integers(0, 3))), np.zeros(len(t)))
    noise = _noise(rng, len(t))
    if rng.random() < 0.3:  # seasons and noise that grow with the level
        scale = np.exp(0.5 * base / (np.abs(base).max() + 1e-6))
        season, noise = season * scale, noise * scale
    series = base + season + noise
    if rng.random() < 0.15:  # counts, loads, rates: nothing below zero
        series = np.maximum(series - np.quantile(series, rng.uniform(0, 0.3)), 0)
    if rng.random() < 0.1:  # read backwards, a series is one still
        series = series[::-1]
    return series


def _level(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """Nothing, a line with a bend, steps, a random walk or a slow wave."""
    length, kind = len(t), rng.integers(5)
    if kind == 1:
        bend = rng.integers(length)
        first, second = rng.normal(size=2) * rng.uniform(0, 3)
        return first * t / length + np.where(t > bend, second * (t - bend) / length, 0)
    if kind == 2:
        steps = np.zeros(length)
        for place in rng.integers(length, size=rng.integers(1, 4)):
            steps[place:] += rng.normal()
        return steps
    if kind == 3:
        return rng.normal(size=length).cumsum() * rng.uniform(0.2, 2) / np.sqrt(length)
    if kind == 4:
        return rng.uniform(0.3, 2) * np.sin(2 * np.pi * (t / length * rng.uniform(0.3, 3) + rng.random()))
    return np.zeros(length)


def _season(rng: np.random.Generator, t: np.ndarray, period: int) -> np.ndarray:
    """A few harmonics, or a random profile, with an amplitude that may drift; weekends may differ."""
    if rng.random() < 0.6:
        wave = np.zeros(len(t))
        for harmonic in range(1, rng.integers(2, 5)):
            phase = 2 * np.pi * (harmonic * t / period + rng.random())
            wave += rng.normal() / harmonic * np.sin(phase)
    else:
        shape = np.convolve(np.tile(rng.normal(size=period), 3), np.hanning(max(3, period // 6) | 1), "same")
        wave = shape[period : 2 * period][t % period]
    wave = wave / (wave.std() + 1e-6) * rng.uniform(0.2, 1.5)
    if rng.random() < 0.3:
        wave = wave * (1 + 0.5 * np.sin(2 * np.pi * (t / len(t) * rng.uniform(0.2, 2) + rng.random())))
    if period in (24, 48, 96) and rng.random() < 0.4:
        weekend = (t // period + rng.integers(7)) % 7 >= 5
        wave = np.where(weekend, wave * rng.uniform(0.2, 0.8), wave)
    return wave


def _noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """White, autoregressive or heavy-tailed noise, now and then with outliers."""
    noise = rng.normal(size=length) if rng.random() < 0.7 else rng.standard_t(3, size=length)
    if rng.random() < 0.4:
        memory = rng.uniform(0.3, 0.95)
        for i in range(1, length):
            noise[i] += memory * noise[i - 1]
        noise = noise * np.sqrt(1 - memory**2)
    if rng.random() < 0.1:
        noise[rng.integers(length, size=rng.integers(1, 4))] += rng.normal() * 5
    return noise * rng.uniform(0.02, 0.6)


class SyntheticWindows:
    """Generated windows with the interface of `SeriesWindows`: number i is the same series whenever it is taken."""

    def __init__(self, count: int, context: int, horizon: int, seed: int = 0) -> None:
        self.count, self.context, self.horizon, self.seed = count, context, horizon, seed

    def __len__(self) -> int:
        return self.count

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [windows, context + horizon]; every tenth has points missing from its context."""
        windows = np.concatenate(
            [synthetic_series(1, self.context + self.horizon, self.seed, int(number)) for number in numbers]
        )
        for row, number in zip(windows, numbers):
            if number % 10 == 0:
                rng = np.random.Generator(np.random.Philox(key=self.seed + 1, counter=int(number)))
                row[: self.context][rng.random(self.context) < rng.uniform(0.02, 0.3)] = np.nan
        return windows

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All windows in their order, `size` of them at a time."""
        for start in range(0, self.count, size):
            yield self.take(np.arange(start, min(start + size, self.count)))
