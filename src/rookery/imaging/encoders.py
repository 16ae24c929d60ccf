"""Frozen text encoders for models that are given features in place of words."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rookery.models.clip import RWKVCLIP
from rookery.models.dir7 import Text


class RWKVCLIPTextEncoder:
    """The text tower of an RWKV-CLIP model: one vector a token, before they are averaged.

    Any other encoder is as short: a callable from prompts to a `Text`.
    """

    def __init__(self, model: RWKVCLIP, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> None:
        """`tokenizer` is the tower's, a `rookery.tokenizers.texts.TextInput`, which cuts what is too long."""
        self.model, self.tokenizer = model.eval(), tokenizer

    @property
    def size(self) -> int:
        """Numbers that describe a token: `text_size` of the model that reads them."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Text:
        """Features [b, l, size]; the end of the text is the last token that counts."""
        tower, device = self.model.text_model, self.model.logit_scale.device
        ids = self.model.checked(torch.from_numpy(self.tokenizer(list(prompts))).to(device))
        end = ids == self.model.config.vocab_size - 1
        there = end.cumsum(dim=1) - end.long() == 0
        features = tower.tokens(ids, there if self.model.config.pad_mode == "masked" else None)
        longest = int(there.sum(dim=1).max()) if len(ids) else 0
        return Text(features[:, :longest], there[:, :longest])
