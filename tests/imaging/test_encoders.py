import numpy as np
import pytest
import torch
from support.diffusion import randomised

from rookery.imaging.encoders import RWKVCLIPTextEncoder
from rookery.imaging.pipeline import DIR7Pipeline
from rookery.models import create_model


def letters(prompts, vocab_size, length):
    """Begin, letters, end, and what fills up."""
    rows = np.zeros((len(prompts), length), np.int64)
    for row, prompt in zip(rows, prompts):
        ids = [vocab_size - 2, *(ord(c) % (vocab_size - 2) for c in prompt), vocab_size - 1]
        row[: len(ids)] = ids
    return rows


@pytest.mark.parametrize("name", ["rwkv-clip-test", "rwkv-clip-clip77-test"])
def test_a_text_tower_says_what_a_picture_is_to_show(name):
    clip = create_model(name, seed=2)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    config = clip.config
    encoder = RWKVCLIPTextEncoder(clip, lambda p: letters(p, config.vocab_size, config.context_length))
    text = encoder(["ab", "abcde"])
    assert text.features.shape == (2, 7, encoder.size)
    assert text.mask.sum(dim=1).tolist() == [4, 7]
    torch.testing.assert_close(encoder(["ab"]).features[0], text.features[0, :4])

    model = randomised("dir-7-read-test", dtype=torch.float32, text_size=encoder.size)
    drawn = DIR7Pipeline(model, encoder)(["ab", "abcde"], generator=0, num_inference_steps=2, output_type="np").images
    alone = DIR7Pipeline(model, encoder)("ab", generator=0, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)
    assert np.isfinite(drawn).all()
    assert alone.shape == (1, 8, 8, 1)
