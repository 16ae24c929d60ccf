"""Forecast a column of a CSV file: quantiles for the rows to come, as CSV and as a picture.

The first column is the time if it reads as dates; without dates rows are numbered. Missing values may be empty.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rookery.forecasting.result import Forecast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="CSV file with a header, rows in order of time")
    parser.add_argument("--target", metavar="COLUMN", help="what to forecast (default: the last column)")
    parser.add_argument("--horizon", type=int, default=96, metavar="ROWS", help="rows to forecast (%(default)s)")
    parser.add_argument("--model", help="forecaster to use: a file or folder (default: the one that is shipped)")
    parser.add_argument(
        "--levels", default="0.1,0.5,0.9", help="quantile levels, separated by commas (%(default)s); '' for none"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="CSV file to write (default: the standard output)")
    parser.add_argument("--plot", metavar="FILE", help="picture to write (.png, .svg, .pdf)")


def run(given: argparse.Namespace) -> int:
    from rookery.cli.train import before_torch

    before_torch()
    from rookery.checkpoints.atomic import replacing
    from rookery.data.series import future_times, read_table
    from rookery.forecasting.pipeline import ForecastPipeline

    levels = [_level(text) for text in given.levels.split(",") if text.strip()]
    table = read_table(given.data)
    target = given.target or table.names[-1]
    history = table.column(target)
    index = future_times(table, max(0, given.horizon))  # before the model is loaded: it names gaps in the file
    pipeline = ForecastPipeline.from_pretrained(given.model)
    forecast = pipeline.predict(history, given.horizon, item_id=target, index=index)
    text = as_csv(forecast, levels, target)
    with ExitStack() as files:  # both files are whole before either takes its place
        if given.plot:
            plot(forecast, files.enter_context(replacing(given.plot)), Path(given.plot).suffix[1:] or "png")
        if given.out:
            files.enter_context(replacing(given.out)).write_text(text, encoding="utf-8")
    if given.out:
        print(f"{given.out}: {given.horizon} rows of {target}", file=sys.stderr)
    else:
        print(text, end="")
    if given.plot:
        print(f"{given.plot}: the last of the history and the forecast", file=sys.stderr)
    return 0


def _level(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--levels takes numbers between 0 and 1 such as 0.1,0.5,0.9; got {text!r}") from None


def as_csv(forecast: Forecast, levels: list[float], target: str) -> str:
    """Time, the mean under the name of the target, and one column a level."""
    columns = [forecast.mean, *(forecast.quantile(level) for level in levels)]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["time", target, *(f"{level:g}" for level in levels)])
    for time, *values in zip(forecast.index, *columns):
        rows.writerow([str(time).replace("T", " "), *(f"{value:.6g}" for value in values)])
    return file.getvalue()


def plot(forecast: Forecast, path: Path, form: str) -> None:
    """Writes the picture in a format that matplotlib knows ("png", "svg", "pdf")."""
    from rookery.plotting import new_figure

    figure = new_figure(9, 4, extra="series")
    forecast.plot(figure.subplots())
    figure.savefig(path, format=form, dpi=120)
