"""The model that is shipped: it is true that …"""

import numpy as np

from rookery.data.images import digits
from rookery.evaluate.generated import Neighbours, prompt_accuracy
from rookery.imaging.pipeline import SHIPPED, DIR7Pipeline


def test_it_is_small_and_draws_the_digits_that_it_is_asked_for():
    assert SHIPPED.stat().st_size < 2_000_000
    pipeline = DIR7Pipeline.from_pretrained()
    asked = np.repeat(np.arange(10), 4)
    prompts = [f"a handwritten {digit}" for digit in asked]
    drawn = pipeline(prompts, generator=0, num_inference_steps=10, guidance_scale=2.0, output_type="np").images
    real = digits()
    assert prompt_accuracy(drawn * 255, asked, Neighbours.of(real.sources, real.labels)) > 0.8
