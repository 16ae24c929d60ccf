import numpy as np
import torch
from support.language import randomised

from rookery.engine.llm import LLM
from rookery.engine.picture import picture, state_norms
from rookery.engine.runners.torch import TorchRunner


def test_every_layer_has_a_bar():
    for name in ("rwkv7-test", "rwkv4-test", "transformer-test"):
        llm = LLM.from_runner(TorchRunner(randomised(name, dtype=torch.float32)))
        session = llm.session()
        session.feed([1, 2, 3])
        norms = state_norms(session)
        assert len(norms) == llm.runner.config.num_hidden_layers
        assert min(norms) > 0
        text = picture(session)
        assert len(text.splitlines()) == 1 + len(norms)
        assert "█" * 40 in text
    wkv = TorchRunner(randomised("rwkv7-test")).init_state().tensors()["layers.0.wkv"]
    assert not np.any(wkv)


def test_an_empty_state_is_drawn_too():
    session = LLM.from_runner(TorchRunner(randomised("rwkv7-test"))).session()
    assert picture(session).startswith("0 tokens in a state of")
