"""Finds files of real data in the data folder, or says what is missing and where to get it.

Data is not shipped and nothing here downloads it. `sources.tsv` lists every file that the library's experiments and
tests use, by its path inside the folder: size, digest, where it is published, licence.
"""

import csv
from functools import cache
from pathlib import Path

from rookery.errors import RookeryError

USUAL = ("../shared/data", "shared/data")
"""Where the data folder is looked for, from the working directory, when none is given."""


class MissingData(RookeryError, FileNotFoundError):
    """A file of the data folder is not there; the message says where it is published."""


@cache
def sources() -> dict[str, dict[str, str]]:
    """Path inside the data folder -> row of sources.tsv."""
    with Path(__file__).with_name("sources.tsv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


def data_folder(given: str | Path | None = None) -> Path | None:
    """The data folder: the one given, else the first of `USUAL` that exists, else None.

    Raises FileNotFoundError where the one given does not exist.
    """
    if given:
        if not Path(given).is_dir():
            raise FileNotFoundError(f"there is no data folder {str(given)!r}; give one that exists")
        return Path(given)
    return next((path for path in map(Path, USUAL) if path.is_dir()), None)


def locate(*names: str, folder: str | Path | None = None) -> list[Path]:
    """Paths of files in the data folder, in the order asked for.

    Raises MissingData naming every file that is not there, where it comes from and under what licence.
    """
    root = data_folder(folder)
    missing = [name for name in names if root is None or not (root / name).exists()]
    if missing:
        where = f"the data folder {str(root)!r}" if root else f"no data folder ({' and '.join(USUAL)} do not exist); it"
        parts = "; ".join(_describe(name) for name in missing)
        raise MissingData(f"{where} lacks {parts}. Put the files there, or name another folder with --data.")
    return [root / name for name in names]


def _describe(name: str) -> str:
    row = sources().get(name)
    return (
        f"{name} (from {row['source']}, {row['bytes']} bytes, {row['licence']})" if row else f"{name} (no known source)"
    )
