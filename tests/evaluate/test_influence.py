import pytest
import torch
from support.language import names, randomised

from rookery.evaluate.influence import influence
from rookery.models import create_model


@pytest.mark.parametrize("name", [n for n in names() if not n.startswith("rosa")])
def test_every_model_can_be_asked_how_far_back_it_looks(name):
    found = influence(randomised(name), [0, 1, 12], rows=2)
    assert len(found) == 3
    assert all(value > 0 for value in found)


def test_the_influence_is_the_gradient_at_the_embedding():
    model = create_model("rwkv4-test", dtype=torch.float64)
    values = influence(model, [3], rows=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(64, (1, 4), generator=generator)
    direction = torch.randn(32, generator=generator).double()

    def read(moved):
        embedded = model.blocks[0].ln0(torch.cat([moved, model.emb(tokens)[:, 1:]], dim=1))
        state = model.init_state(1)
        return model.run(embedded, state, model.call(tokens, embedded, state, None))[0][0, -1] @ direction

    want = torch.autograd.functional.jacobian(read, model.emb(tokens)[:, :1].detach()).norm()
    assert values == [pytest.approx(float(want))]


def test_mediums_reach_as_far_as_there_is_text():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    near_and_far = []
    for name in ("rwkv4", "rrwkv"):
        model = create_model(name, **sizes)
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2 and not parameter.any():  # a fresh model reads nothing at all
                torch.nn.init.orthogonal_(parameter, generator=torch.Generator().manual_seed(number))
        near_and_far.append(influence(model, [100, 600], rows=1))
    plain, looking_back = near_and_far
    assert looking_back[1] / looking_back[0] > 10 * plain[1] / plain[0]
