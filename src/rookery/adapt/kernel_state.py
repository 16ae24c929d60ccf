"""Kernel-upscaled start states: more numbers to train than a plain one has, read through a Gaussian kernel.

State Tuning (arXiv 2504.05097) names the idea; this is an interpretation, there are no public code, weights or tables
to compare with (state_methods.md 1.4). The equations are in `rookery.models.kernel_state`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rookery.adapt.read_features import recorded
from rookery.adapt.state_tuning import StartState
from rookery.checkpoints.tuned_state import TunedState
from rookery.models.kernel_state import KernelStateModel
from rookery.models.literal_state import LiteralStateModel
from rookery.models.rwkv7 import RWKV7
from rookery.state import from_numpy

# h heads, n channels of a head, m features, p keys

WIDTH = 4.0
"""γ = WIDTH / median |u_i − u_j|². The usual 1 makes all features nearly equal, and the state learns less than a plain
one; 16 is too narrow (state_methods.md 1.4)."""
CALIBRATION = 4096
"""Tokens at most that support vectors are chosen from."""


class KernelStart(StartState):
    """The upscaled state before the first token as parameters, `wkv.i` [h, n, m], all zeros at first.

    `model[0]` is the model that hosts it: `start.model[0](tokens, start(rows))`. It shares the weights of the RWKV-7
    that this is made for. `features` is m, four times n unless given. `kernel` "linear" reads without the Gaussian;
    `transition` "none" lets the state neither decay nor be erased, so that it never fades on long texts; `writes` lets
    the tokens write to it, too, behind a gate per head that begins closed. Call `calibrate` before training.
    """

    field = "kstate"

    def __init__(
        self,
        model: RWKV7,
        *,
        features: int | None = None,
        kernel: Literal["rbf", "linear"] = "rbf",
        transition: Literal["full", "none"] = "full",
        writes: bool = False,
        shifts: bool = False,
        width: float = WIDTH,
    ) -> None:
        for name, value, known in (("kernel", kernel, ("rbf", "linear")), ("transition", transition, ("full", "none"))):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
        size = 4 * model.config.head_dim if features is None else features
        if size < 1:
            raise ValueError(f"a kernel state has 1 feature or more, got {size}")
        super().__init__(KernelStateModel(model, size), shifts=shifts)
        self.kernel, self.width = kernel, width
        heads, head_dim = model.config.num_heads, model.config.head_dim
        wide = self.wkv[0]
        self.gates = nn.ParameterList(nn.Parameter(wide.new_zeros(heads)) for _ in self.wkv) if writes else None
        moves = wide.new_tensor([float(transition == "full"), float(writes), 1.0])
        for i in range(len(self.wkv)):
            self.register_buffer(f"support_{i}", wide.new_zeros(heads, size, head_dim))
            self.register_buffer(f"rule_{i}", torch.cat([wide.new_ones(1), moves]).repeat(heads, 1))

    def constant(self, layer: int, field: str, fresh: Tensor) -> Tensor:
        if field == "support":
            return self.get_buffer(f"support_{layer}")
        if field != "rule":
            return fresh
        rule = self.get_buffer(f"rule_{layer}")
        return rule if self.gates is None else torch.cat([rule[:, :3], self.gates[layer][:, None]], dim=-1)

    @torch.no_grad()
    def calibrate(
        self, tokens: Tensor, support: Literal["kmeans", "sample", "random"] = "kmeans", seed: int = 0
    ) -> list[float]:
        """Chooses support vectors from the keys of a text, int [b, t], and γ; per layer, how alike the features are.

        That is the mean off-diagonal of the normalised Gram matrix: near 1 all features say the same.
        """
        model = self.model[0].base[0]
        with recorded(model) as kept:
            model.features(tokens[:, : max(1, CALIBRATION // tokens.shape[0])], None, None)
        keys = [one.call["k"].flatten(0, 1)[:CALIBRATION].to(self.wkv[0]) for one in kept]
        return self.choose(keys, support, seed)

    @torch.no_grad()
    def choose(self, keys: Sequence[Tensor], support: str = "kmeans", seed: int = 0) -> list[float]:
        """As `calibrate`, from the keys [p, h, n] of every layer."""
        if support not in CHOICES:
            raise ValueError(f"support must be one of {', '.join(CHOICES)}, got {support!r}")
        alike = []
        for layer, k in enumerate(keys):
            vectors = torch.stack([CHOICES[support](one, self.features, seed) for one in _directions(k).unbind(1)])
            alike.append(self.use(layer, vectors))
        return alike

    @property
    def features(self) -> int:
        """Key channels of a head's state, m."""
        return self.wkv[0].shape[-1]

    @torch.no_grad()
    def use(self, layer: int, support: Tensor) -> float:
        """Takes support vectors [h, m, n] for a layer, with the γ that fits them; gives how alike the features are."""
        self.get_buffer(f"support_{layer}").copy_(support)
        apart = torch.cdist(support.double(), support.double()).square()
        different = ~torch.eye(apart.shape[-1], dtype=torch.bool, device=apart.device)
        between = apart[:, different]
        gamma = (
            self.width / between.median(-1).values.clamp(min=1e-9) if between.numel() else apart.new_ones(len(apart))
        )
        self.get_buffer(f"rule_{layer}")[:, 0] = 0 if self.kernel == "linear" else gamma
        if self.kernel == "linear":
            unit = torch.nn.functional.normalize(support.double(), dim=-1)
            return float((unit @ unit.mT)[:, different].abs().mean())
        return float((-gamma[:, None] * between).exp().mean())


class LiteralStart(StartState):
    """The square state of the printed form, [h, m, m], for study: it does not begin as the model it is made for.

    `model[0]` is the model that reads it; `calibrate` before anything else. It has no file and no place in the engine.
    """

    field = "kstate"

    def __init__(self, model: RWKV7, *, features: int | None = None, width: float = WIDTH) -> None:
        super().__init__(LiteralStateModel(model, 4 * model.config.head_dim if features is None else features))
        self.width = width

    @torch.no_grad()
    def calibrate(
        self, tokens: Tensor, support: Literal["kmeans", "sample", "random"] = "kmeans", seed: int = 0
    ) -> None:
        """Support vectors and γ from the keys of a text, int [b, t], and the way back, Q, from its values."""
        chosen = KernelStart(self.model[0].base[0], features=self.wkv[0].shape[-1], width=self.width)
        chosen.calibrate(tokens, support, seed)
        with recorded(chosen.model[0].base[0]) as kept:
            chosen.model[0].base[0].features(tokens, None, None)
        for i, (block, one) in enumerate(zip(self.model[0].blocks, kept)):
            block.support.copy_(chosen.get_buffer(f"support_{i}"))
            block.gamma.copy_(chosen.get_buffer(f"rule_{i}")[:, 0])
            block.fit(one.call["v"].flatten(0, 1)[:CALIBRATION])


def load_kernel_start(tuned: TunedState, model: RWKV7, *, shifts: bool = False) -> KernelStart:
    """The kernel state that a file holds; BadState for another model's."""
    plain = StartState(model)
    arrays = tuned.onto(plain.fresh[0].arrays(), family=model.family, config=model.config, model=model.fingerprint())
    values = {name: from_numpy(array)[0] for name, array in arrays.items() if name != "tokens_seen"}
    start = KernelStart(model, features=values["layers.0.kstate"].shape[-1], shifts=shifts)
    for i in range(len(start.wkv)):
        start.get_buffer(f"support_{i}").copy_(values[f"layers.{i}.support"])
        start.get_buffer(f"rule_{i}").copy_(values[f"layers.{i}.rule"])
    if start.get_buffer("rule_0")[0, 2]:
        start.gates = nn.ParameterList(
            nn.Parameter(start.get_buffer(f"rule_{i}")[:, 3].clone()) for i in range(len(start.wkv))
        )
    start.begin_from(values)
    return start


def _directions(keys: Tensor) -> Tensor:
    return nn.functional.normalize(keys.double(), dim=-1)


def spherical_kmeans(points: Tensor, count: int, seed: int = 0, iterations: int = 10) -> Tensor:
    """`count` unit vectors [count, n], centres of the unit vectors [p, n] by angle.

    Where there are fewer points than centres the others are random directions.
    """
    centres = sample(points, count, seed)
    for _ in range(iterations):
        nearest = (points @ centres.mT).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        length = sums.norm(dim=-1, keepdim=True)
        # a centre that nobody is nearest to stays where it is
        centres = torch.where(length > 1e-9, sums / length.clamp(min=1e-9), centres)
    return centres


def sample(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` of the unit vectors [p, n], drawn without replacement; random directions where there are too few."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)[:count].to(points.device)
    missing = gaussian(points, count - len(order), seed + 1)
    return torch.cat([points[order], missing])


def gaussian(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` random directions [count, n] of the width of the points [p, n]."""
    drawn = torch.randn(count, points.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=-1).to(points)


CHOICES = {"kmeans": spherical_kmeans, "sample": sample, "random": gaussian}
"""How support vectors are chosen."""
