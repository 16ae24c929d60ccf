"""What the families of forecasters share: a series is cut into patches, and patches to come are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Shapes


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """How a series becomes tokens and tokens become a forecast."""

    hidden_size: int = 64
    """Width of the residual stream."""
    num_hidden_layers: int = 2
    """Blocks."""
    patch_length: int = 24
    """Points of a token: a day of hourly values."""
    output_patches: int = 1
    """Patches that every token predicts; 1 is the next one alone, as in Timer."""
    levels: tuple[float, ...] = ()
    """Quantile levels that are predicted, rising, 0.5 among them; where empty, one value (the mean, after MSE)."""
    context_length: int = 336
    """Points of history that a forecast looks back on unless told otherwise."""
    dropout: float = 0.0
    """Share of activations dropped in training, after the embedding, after every block and before the head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))  # JSON has lists only
        for name in ("hidden_size", "num_hidden_layers", "patch_length", "output_patches", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.levels and (list(self.levels) != sorted(set(self.levels)) or 0.5 not in self.levels):
            raise ValueError(f"levels must rise and contain 0.5, got {list(self.levels)}")
        if any(not 0 < level < 1 for level in self.levels):
            raise ValueError(f"levels must lie between 0 and 1, got {list(self.levels)}")

    @property
    def outputs(self) -> int:
        """Values predicted for every point to come."""
        return max(1, len(self.levels))

    @property
    def reach(self) -> int:
        """Points that are predicted at once."""
        return self.output_patches * self.patch_length


def median_of(levels: Sequence[float]) -> int:
    """Place of the median among the predicted levels; of the one value where there are none."""
    return list(levels).index(0.5) if levels else 0


def layers_in(shapes: Shapes, prefix: str) -> int:
    """Number of blocks whose tensors' names start with `prefix` and a number."""
    place = prefix.count(".")
    return 1 + max((int(name.split(".")[place]) for name in shapes if name.startswith(prefix)), default=-1)


def predicted_patches(rows: int, patch_length: int) -> int:
    """Patches that a head with so many rows predicts, one value a point; BadCheckpoint where it does not come out."""
    if rows % patch_length:
        raise BadCheckpoint(f"the head has {rows} rows, which are no whole patches of {patch_length} points")
    return rows // patch_length
