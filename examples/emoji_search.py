"""Trains a small RWKV-CLIP on Noto's emoji and draws what it finds for a few texts (docs/how-to/emoji-search.png).

python examples/emoji_search.py [--data ../shared/data] [--steps 500] [--out out/emoji]
"""

import argparse
import json
from pathlib import Path

from rookery.data.emoji import noto_emoji
from rookery.data.images import resized, save_image
from rookery.data.locate import locate
from rookery.evaluate.retrieval import Embedder, search, search_sheet
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train

SMALL = {"patch_size": 8, "num_hidden_layers": 2, "text_layers": 1}
QUERIES = ("cat face", "red heart", "clock", "a green plant", "smiling face", "hand", "dog")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the data folder")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", default="out/emoji")
    given = parser.parse_args()
    out = Path(given.out)
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    emoji = noto_emoji(*locate("vision/emoji_72px.tar", "vision/emoji_captions.json", folder=given.data))
    rows = []
    for number, one in enumerate(emoji):
        path = pictures / f"{number}.png"
        if not path.exists():
            save_image(resized(one.pixels(), 32, 32), path)
        texts = {"raw": one.caption, "synthetic": " ".join(one.aliases), "tags": [*one.tags, *one.aliases]}
        rows.append({"image": f"pictures/{path.name}", **texts})
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {
        "data": {"path": str(out / "pairs.jsonl")},
        "overrides": {"hidden_size": 64, "image_intermediate_size": 320, "text_intermediate_size": 224, **SMALL},
        "optim": {"lr": 5e-3},
        "out": str(out / "run"),
        "steps": given.steps,
    }
    train(overlay(recipe("clip-nano"), settings))
    embedder = Embedder.open(str(out / "run"))
    sources = [one.source for one in emoji]
    found = search(embedder.images(sources), embedder.embed_texts(QUERIES), top=8)
    search_sheet(out / "search.png", sources, QUERIES, found)


if __name__ == "__main__":
    main()
