"""Draw what a text says, with the text-to-digit model that is shipped or one that you trained.

The picture is a grid, a row for each prompt. Nothing but the file's name goes to the standard output.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="TEXT", help="what to draw; each text is a row of the picture")
    parser.add_argument("-o", "--out", metavar="FILE", default="grid.png", help="picture to write (%(default)s)")
    parser.add_argument("--model", metavar="PATH", help="file or folder of a DIR-7 model (default: the one shipped)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="pictures of each text (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps from noise (%(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=2.0, metavar="X", help="how much the text counts (%(default)s)"
    )
    parser.add_argument("--negative", metavar="TEXT", help="what to stay away from")
    parser.add_argument("--sampler", choices=("ddim", "ddpm", "dpm++", "euler"), help="way back from noise (ddim)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed, the same picture (%(default)s)"
    )
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of one picture (default: as trained)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of one picture (default: as trained)")
    parser.add_argument("--zoom", type=int, metavar="N", help="times that a pixel is enlarged (default: to 64 or more)")


def run(given: argparse.Namespace) -> int:
    from rookery.cli.train import before_torch

    before_torch()
    import numpy as np

    from rookery.cli.progress import Progress
    from rookery.data.images import contact_sheet, save_image
    from rookery.imaging.pipeline import DIR7Pipeline

    for name, least, most in (("count", 1, 1000), ("zoom", 1, 64)):
        value = getattr(given, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} goes from {least} to {most}, got {value}")
    pipeline = DIR7Pipeline.from_pretrained(given.model)
    if given.sampler:
        pipeline = DIR7Pipeline(pipeline.model, scheduler=given.sampler)
    progress = Progress("steps")
    drawn = pipeline(
        given.prompts,
        given.negative,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        num_images_per_prompt=given.count,
        generator=given.seed,
        height=given.height,
        width=given.width,
        output_type="np",
        report=progress,
    ).images
    progress.close()
    zoom = given.zoom or max(1, -(-64 // drawn.shape[1]))
    pixels = np.rint(drawn * 255).astype(np.uint8).repeat(zoom, axis=1).repeat(zoom, axis=2)
    save_image(contact_sheet(list(pixels), given.count, gap=4), given.out)
    print(f"{len(given.prompts)} × {given.count} pictures of {drawn.shape[2]} × {drawn.shape[1]}", file=sys.stderr)
    print(given.out)
    return 0
