"""Emoji with their texts, as small sets of captioned pictures."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rookery.data.images import Source, read_image, tar_members


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
