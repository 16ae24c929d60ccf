"""What of a model is trained. Plain data: knows neither torch nor peft."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["full", "lora", "rslora", "dora", "pissa", "miss", "mini", "bat", "state", "perspectives"]
ADAPTERS = ("lora", "rslora", "dora", "pissa", "miss", "mini", "bat")
"""Methods that add matrices to the model's own."""
LOW_RANK = ("lora", "rslora", "dora", "pissa")
"""Those with two factors; the others have blocks."""
IN_RWKV_PEFT = ("lora", "pissa", "miss")
"""Those that RWKV-PEFT's files can hold: its BAT shares blocks along the other axis, the others it does not have."""
FORMER = {"bone": "miss (Bone since its third version) or bat (Bone's first form)", "disha": "miss or bat"}
"""Earlier names of the papers (adaptation.md C.0)."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What is trained, and with how many numbers."""

    method: Method = "lora"
    """All weights ("full"), low-rank or block matrices beside them ("lora", "rslora", "dora", "pissa"; "miss", "mini",
    "bat"), only the state that every text begins from ("state"), or the mixing vectors of several temporal perspectives
    ("perspectives")."""
    rank: int = 16
    """Rank of low-rank matrices; rows of the block of "miss", "mini" and "bat" (r in their papers)."""
    mini_r: int = 0
    """Columns of the block of "mini", which is repeated over the outputs; 0 for as many as rows."""
    alpha: float = 0.0
    """Strength of low-rank matrices: the update is scaled by alpha / rank, by alpha / √rank for "rslora"; 0 for
    alpha = rank. "pissa" always has alpha = rank."""
    base: Literal["", "int8", "int4"] = ""
    """What the matrices under an adapter are rounded to and kept in while it learns; empty for the run's floats. The
    adapter then belongs to the rounded matrices: `merge=true` writes these with it."""
    dropout: float = 0.0
    """Share of an adapter's inputs that a training step drops."""
    targets: str = "att,ffn"
    """Where adapters go: parts of a block separated by commas, each with all its matrices ("att") or one of them
    ("att.key")."""
    perspectives: int = 4
    """How many "perspectives" the model becomes; its time and its state grow as many times."""
    shifts: bool = False
    """Whether "state" also trains the vectors that stand for the token before the first."""
    start: str = ""
    """What is trained further: of "state" a file with a tuned state or what a session saved after a prompt, of an
    adapter the folder that a run wrote, with the same method, rank and targets. Where empty, it begins from nothing."""
    features: int = 0
    """Features per head of a kernel-upscaled "state", RWKV-5 to 7; four times the head's channels are usual. 0 trains
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
            now = f"; it is called {FORMER[self.method]} today" if self.method in FORMER else ""
            raise ValueError(f"adapt.method must be one of {', '.join(known)}; got {self.method!r}{now}")
        if self.method != "state" and (self.features or self.decorrelate):
            raise ValueError(f"adapt.features and adapt.decorrelate are for the method state, not {self.method}")
        if self.features < 0:
            raise ValueError(f"adapt.features must be 0 or more, got {self.features}")
        if self.rank < 1:
            raise ValueError(f"adapt.rank must be at least 1, got {self.rank}")
        if self.perspectives < 1:
            raise ValueError(f"adapt.perspectives must be at least 1, got {self.perspectives}")
        if self.mini_r < 0 or (self.mini_r and self.method != "mini"):
            raise ValueError(f"adapt.mini_r is for the method mini and 0 or more; got {self.mini_r} for {self.method}")
        if self.base not in ("", "int8", "int4"):
            raise ValueError(f"adapt.base must be int8, int4 or empty, got {self.base!r}")
        if self.base and self.method not in ADAPTERS:
            raise ValueError(
                f"adapt.base rounds what does not learn: it is for {', '.join(ADAPTERS)}, not {self.method}"
            )
        if self.start and self.method == "pissa":
            raise ValueError(
                "a PiSSA adapter is written as a LoRA of twice the rank: go on with method=lora and that rank"
            )
        if self.start and self.method not in (*ADAPTERS, "state"):
            raise ValueError(f"adapt.start is for adapters and states, not for {self.method}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapt.dropout must lie in [0, 1), got {self.dropout}")
