"""Emoji with their texts, as small sets of captioned pictures."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rookery.data.images import Source, pillow, read_image, tar_members


@dataclass(frozen=True)
class Emoji:
    """A drawing with its texts."""

    source: Source
    caption: str
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    category: str = ""

    def pixels(self, channels: int = 3) -> np.ndarray:
        """uint8 [height, width, channels], on white."""
        return read_image(self.source, channels)


def noto_emoji(archive: str | os.PathLike[str], captions: str | os.PathLike[str]) -> list[Emoji]:
    """The drawings of an archive with the texts of a JSON list: file, caption, tags, aliases, category."""
    members = {member.name: member for member in tar_members(archive)}
    rows = json.loads(Path(captions).read_text(encoding="utf-8"))
    if missing := [row["file"] for row in rows if row["file"] not in members]:
        raise ValueError(f"{archive} lacks {missing[0]!r}, which {captions} describes")

    def texts(given: list[str]) -> tuple[str, ...]:
        return tuple(text.replace("_", " ") for text in given)

    return [Emoji(members[r["file"]], r["caption"], texts(r["tags"]), texts(r["aliases"]), r["category"]) for r in rows]


VENDORS = ("google", "twitter", "emojione", "apple")
"""Whose drawings of the same emoji the sheets hold."""
SPRITE = 32
"""Pixels of a drawing's side."""


def vendor_emoji(folder: str | os.PathLike[str], vendors: tuple[str, ...] = VENDORS) -> dict[str, list[Emoji]]:
    """Vendor -> the same emoji in the same order, flags and those that a vendor lacks left out.

    `folder` holds sheet_VENDOR_32.png, emoji.json (names and places) and emoji-en-US.json (keywords), see
    `rookery.data.locate`. Captions are Unicode's names in lower case, aliases the short names, tags the keywords.
    """
    folder = Path(folder)
    rows = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    keywords = json.loads((folder / "emoji-en-US.json").read_text(encoding="utf-8"))
    rows = [
        row
        for row in rows
        if row["name"] and row["category"] != "Flags" and all(row[f"has_img_{vendor}"] for vendor in VENDORS)
    ]
    found: dict[str, list[Emoji]] = {}
    for vendor in vendors:
        sheet = read_rgba(folder / f"sheet_{vendor}_{SPRITE}.png")
        found[vendor] = [_drawn(row, sheet, keywords) for row in rows]
    return found


def read_rgba(path: Path) -> np.ndarray:
    """uint8 [h, w, 4] of a sheet."""
    with pillow().open(path) as image:
        return np.asarray(image.convert("RGBA"))


def _drawn(row: dict, sheet: np.ndarray, keywords: dict[str, list[str]]) -> Emoji:
    x, y = row["sheet_x"] * SPRITE, row["sheet_y"] * SPRITE
    sign = "".join(chr(int(code, 16)) for code in row["unified"].split("-"))
    tags = next((keywords[s] for s in (sign, sign + "\ufe0f", sign.replace("\ufe0f", "")) if s in keywords), [])
    return Emoji(
        sheet[y : y + SPRITE, x : x + SPRITE].copy(),
        row["name"].lower(),
        tuple(tag.replace("_", " ") for tag in tags),
        tuple(name.replace("_", " ").replace("-", " ") for name in row["short_names"]),
        row["category"],
    )
