"""Multiple Temporal Perspectives (arXiv 2402.02625): a model several times, with mixing vectors and states of its own.

    z^i = base(tokens) with the token-shift mixing vectors of perspective i        α = softmax_i(convert3 · mean_j z^j)
    logits = Σ_i α_i head(z^i) = head(Σ_i α_i z^i)

All other weights are shared. Parameters have the names of RazvanDu/TemporalRNNs: mixing vectors with a first axis
for the perspectives, and `convert3`. The base is the family's own model, called once for each perspective.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rookery.families.temporal_perspectives import (
    FAMILY,
    MIX,
    TemporalPerspectivesConfig,
    around,
    base_family,
    is_mix,
)
from rookery.models import build
from rookery.nn.initial import normal_
from rookery.nn.language_model import LanguageModel
from rookery.state import State

# b batch, t time, n perspectives, c width


class TemporalPerspectives(LanguageModel):
    """The language model: `logits, state = model(tokens, state)`; every tensor of its state is [b, n, …]."""

    family = FAMILY.name
    static_step = True

    def __init__(self, config: TemporalPerspectivesConfig) -> None:
        super().__init__()
        self.config = config
        base = build(base_family(config.base), config.base_config)
        self._base = [base]  # in a list, so that its weights go by their own names
        for name, module in base.named_children():
            self.add_module(name, module)
        for owner, name in self._places():
            one = owner.get_parameter(name)
            owner.register_parameter(name, nn.Parameter(torch.empty(config.perspectives, *one.shape)))
        self.convert3 = nn.Linear(config.hidden_size, config.perspectives, bias=False)

    @classmethod
    @torch.no_grad()
    def from_base(
        cls, model: LanguageModel, n: int = 4, *, convert_std: float = 0.01, mix_noise: float = 0.0, seed: int = 0
    ) -> "TemporalPerspectives":
        """`model` with n perspectives that are all its own: the same logits, until training tells them apart.

        That takes a `convert_std` above zero: with equal weights all perspectives would stay equal for ever.
        `mix_noise` multiplies their mixing vectors by 1 + N(0, mix_noise), which gives up the equality. Raises
        UnknownName for a model of another family than RWKV-4 to 7, ValueError for a `convert_std` of zero.
        """
        if convert_std <= 0:
            raise ValueError("convert_std must be above 0: perspectives of equal weight never become different")
        config = around(model.family, model.config, n)
        like, generator = model.head.weight, torch.Generator().manual_seed(seed)
        with torch.device(like.device):
            made = build(FAMILY, config).to(like.dtype)
        weights = model.state_dict()
        for name, parameter in made.named_parameters():
            if name == "convert3.weight":
                normal_(parameter, convert_std, generator)
            else:
                parameter.copy_(weights[name])  # mixing vectors: the same for every perspective
                if is_mix(name) and mix_noise:
                    parameter.mul_(1 + mix_noise * torch.randn(parameter.shape, generator=generator).to(parameter))
        return made

    @torch.no_grad()
    def collapse(self, index: int) -> LanguageModel:
        """A model of the base's family with the mixing vectors of one perspective."""
        model = build(base_family(self.config.base), self.config.base_config).to(self.head.weight)
        with self.perspective(index):
            weights = dict(self.named_parameters())
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def freeze(self, *parts: str) -> list[str]:
        """Lets only `parts` be trained: "mixes", "convert", "head"; gives the names of what is trained.

        The paper speaks of the first two; its code trains the head, too, 23% of the smallest model.
        """
        known = {"mixes": is_mix, "convert": lambda n: n == "convert3.weight", "head": lambda n: n == "head.weight"}
        if unknown := set(parts) - known.keys():
            raise ValueError(f"there is no part {sorted(unknown)[0]!r}; parts are {', '.join(known)}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(known[part](name) for part in parts))
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def _places(self) -> list[tuple[nn.Module, str]]:
        """Modules and names of their parameters that are mixing vectors."""
        names = [name.rpartition(".") for name, _ in self.named_parameters() if is_mix(name)]
        return [(self.get_submodule(owner), name) for owner, _, name in names]

    @contextmanager
    def perspective(self, index: int) -> Iterator[LanguageModel]:
        """The base, as long as the context lasts, with the mixing vectors of one perspective.

        No other thread may use the model meanwhile.
        """
        wholes = [(owner, name, owner.get_parameter(name)) for owner, name in self._places()]
        for owner, name, whole in wholes:
            part = whole[index]  # with its gradient's way back to the whole
            owner._parameters[name] = part if torch.is_grad_enabled() else nn.Parameter(part, requires_grad=False)
        try:
            yield self._base[0]
        finally:
            for owner, name, whole in wholes:
                owner._parameters[name] = whole

    def perspectives(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Features of each perspective [n, b, t, c], their weights [b, t, n], and the state after them."""
        state = self.check_tokens(tokens, state, cu_seqlens)
        features, after = [], []
        for i in range(self.config.perspectives):
            with self.perspective(i) as base:
                z, own = base.features(tokens, self._own(state, i), cu_seqlens)
            features.append(z)
            after.append(own)
        z = torch.stack(features)
        tensors = [own.tensors() for own in after]
        joined = {name: torch.stack([part[name] for part in tensors], dim=1) for name in tensors[0]}
        return z, self.convert3(z.mean(dim=0)).softmax(dim=-1), state.with_tensors(joined, after[0].tokens_seen)

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        z, weights, state = self.perspectives(tokens, state, cu_seqlens)
        # the head is linear and has no bias: one product with the vocabulary does for all perspectives
        return torch.einsum("btn,nbtc->btc", weights, z), state

    def perspective_weights(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """How much each perspective counts at each token, [b, t, n]."""
        return self.perspectives(tokens, state)[1]

    @torch.no_grad()
    def divergence(self) -> list[float]:
        """Mean distance between the mixing vectors of two perspectives, layer by layer; zero says that they are one."""
        layers: list[list[Tensor]] = [[] for _ in range(self.config.num_hidden_layers)]
        for name, parameter in self.named_parameters():
            if match := MIX.fullmatch(name):
                layers[int(match[1])].append(parameter.flatten(1).float())
        return [float(torch.pdist(torch.cat(parts, dim=1)).mean()) if len(parts[0]) > 1 else 0.0 for parts in layers]

    def _own(self, state: State, index: int) -> State:
        own = State(state.layers, state.tokens_seen, self.config.base_config, state.shared)
        return own.with_tensors({name: t[:, index] for name, t in state.tensors().items()}, state.tokens_seen)

    def init_state(self, batch: int = 1) -> State:
        own, count = self._base[0].init_state(batch), self.config.perspectives
        copies = {name: t[:, None].repeat_interleave(count, dim=1) for name, t in own.tensors().items()}
        state = own.with_tensors(copies, own.tokens_seen)
        return State(state.layers, state.tokens_seen, self.config, state.shared)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self._base[0].fingerprint_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        The perspectives begin as one: a fresh model computes what a fresh base does.

        | parameter | value |
        |---|---|
        | `emb`, `blocks.*`, `ln_out`, `head` | as in the base; mixing vectors the same in every perspective |
        | `convert3` | N(0, 0.01) |
        """
        with self.perspective(0) as base:
            base.init_weights(seed)
        for owner, name in self._places():
            whole = owner.get_parameter(name)
            whole.copy_(whole[:1].clone().expand_as(whole))
        normal_(self.convert3.weight, 0.01, torch.Generator().manual_seed(3 + (seed or 0)))
