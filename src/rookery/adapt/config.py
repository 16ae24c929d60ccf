"""What of a model is trained. Plain data: knows neither torch nor peft."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["full", "lora", "pissa", "miss", "bat", "state", "perspectives"]
ADAPTERS = ("lora", "pissa", "miss", "bat")
"""Methods that add matrices to the model's own."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What is trained, and with how many numbers."""

    method: Method = "lora"
    """All weights ("full"), low-rank or block matrices beside them ("lora", "pissa", "miss", "bat"), only the state
    that every text begins from ("state"), or the mixing vectors of several temporal perspectives ("perspectives")."""
    rank: int = 16
    """Rank of "lora" and "pissa"; rows of the block of "miss" and "bat" (r in their papers)."""
    alpha: float = 0.0
    """Strength of "lora": its update is scaled by alpha / rank; 0 for alpha = rank. "pissa" always has alpha = rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that a training step drops."""
    targets: str = "att,ffn"
    """Where adapters go: parts of a block separated by commas, each with all its matrices ("att") or one of them
    ("att.key")."""
    perspectives: int = 4
    """How many "perspectives" the model becomes; its time and its state grow as many times."""
    shifts: bool = False
    """Whether "state" also trains the vectors that stand for the token before the first."""
    features: int = 0
    """Features per head of a kernel-upscaled "state", RWKV-7 only; four times the head's channels are usual. 0 trains
    the plain state, which every runner knows."""
    kernel: Literal["rbf", "linear"] = "rbf"
    """How a kernel state is read."""
    transition: Literal["full", "none"] = "full"
    """Whether a kernel state decays and is erased as the model's own does, or stays what it is."""
    decorrelate: bool = False
    """Whether "state" is trained on decorrelated inputs, which takes fewer steps and a smaller learning rate (0.1)."""

    def __post_init__(self) -> None:
        known = ("full", *ADAPTERS, "state", "perspectives")
        if self.method not in known:
            raise ValueError(f"adapt.method must be one of {', '.join(known)}; got {self.method!r}")
        if self.method != "state" and (self.features or self.decorrelate):
            raise ValueError(f"adapt.features and adapt.decorrelate are for the method state, not {self.method}")
        if self.features < 0:
            raise ValueError(f"adapt.features must be 0 or more, got {self.features}")
        if self.rank < 1:
            raise ValueError(f"adapt.rank must be at least 1, got {self.rank}")
        if self.perspectives < 1:
            raise ValueError(f"adapt.perspectives must be at least 1, got {self.perspectives}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapt.dropout must lie in [0, 1), got {self.dropout}")
