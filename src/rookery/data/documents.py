"""Documents of files and data sets, as text. Needs no torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rookery.errors import MissingDependency

END_OF_TEXT = 0
"""Token between documents."""

DATASET = "hf:"
"""What the name of a data set of the Hugging Face Hub begins with."""


def read_documents(path: str | Path) -> Iterator[str]:
    """Documents of a source.

    The whole of a .txt; the "text" of every line of a .jsonl; the strings of a .json list; the "text" column of a
    .parquet; or, for "hf:NAME", "hf:NAME:SPLIT" and "hf:NAME:CONFIG:SPLIT", that of a data set of the Hub, streamed.
    """
    if str(path).startswith(DATASET):
        yield from _dataset(str(path).removeprefix(DATASET))
        return
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no text file {str(path)!r}")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f'{path}, line {number}: expected a JSON object with a "text" field') from None
    elif path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield path.read_text(encoding="utf-8")


def _parquet(path: Path) -> Iterator[str]:
    for row in parquet_rows(path, ["text"]):
        yield row["text"]


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet, of these columns or of all; ValueError where one is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency('reading .parquet needs pyarrow: pip install "rookery[train]"') from None
    file = parquet.ParquetFile(path)
    for column in columns or ():
        if column not in file.schema_arrow.names:
            raise ValueError(f'{path}: expected a column "{column}", found {", ".join(file.schema_arrow.names)}')
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def _dataset(name: str) -> Iterator[str]:
    for row in dataset_rows(name):
        if "text" not in row:
            raise ValueError(f'{DATASET}{name}: expected a column "text", found {", ".join(row)}')
        yield row["text"]


def dataset_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set of the Hub, "NAME", "NAME:SPLIT" or "NAME:CONFIG:SPLIT", streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingDependency('data sets of the Hub need datasets: pip install "rookery[train]"') from None
    name, *parts = name.split(":")
    split = parts.pop() if parts else "train"
    yield from load_dataset(name, *parts, split=split, streaming=True)


def split(documents: list[str], validation_share: float) -> tuple[list[str], list[str]]:
    """Documents to learn from and to hold out. A single document is cut by characters instead."""
    if validation_share == 0 or not documents:
        return documents, []
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - validation_share))
        return [documents[0][:cut]], [documents[0][cut:]]
    held = max(1, round(len(documents) * validation_share))
    return documents[:-held], documents[-held:]
