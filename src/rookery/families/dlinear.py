"""DLinear (arXiv 2205.13504): two linear maps from history to horizon; the baseline that every forecaster must name."""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.forecast import ForecastConfig


@dataclass(frozen=True, kw_only=True)
class DLinearConfig(ForecastConfig):
    """Sizes of one DLinear."""

    horizon: int = 96
    """Points that one call predicts."""
    kernel: int = 25
    """Points of the moving average that makes the trend."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"DLinear needs horizon ≥ 1 and an odd kernel, got {self.horizon} and {self.kernel}")

    @property
    def reach(self) -> int:
        return self.horizon

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """It keeps nothing."""
        return 0


def create(**given: Any) -> DLinearConfig:
    return DLinearConfig(**given)


def tensor_shapes(config: DLinearConfig) -> dict[str, tuple[int, ...]]:
    rows = config.horizon * config.outputs
    maps = ("trend", "remainder")
    return {k: v for m in maps for k, v in ((f"{m}.weight", (rows, config.context_length)), (f"{m}.bias", (rows,)))}


def recognise(shapes: Shapes) -> bool:
    return {"trend.weight", "remainder.weight"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> DLinearConfig:
    """Sizes from the tensors."""
    if "trend.bias" not in shapes:
        raise BadCheckpoint("not a whole DLinear checkpoint: 'trend.bias' is missing")
    rows, context = shapes["trend.weight"]
    return DLinearConfig(context_length=context, horizon=rows)


FAMILY = Family(
    name="dlinear",
    kind="series",
    config=DLinearConfig,
    builder="rookery.models.dlinear:DLinear",
    presets={"test": DLinearConfig(context_length=32, horizon=8, kernel=5, levels=(0.1, 0.5, 0.9))},
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=("trend.weight", "remainder.bias"),
)
