"""What every language model of the library has in common: one call for prefill, decode, training and packed rows."""

from typing import Any

from torch import Tensor, nn

from rookery.nn.packing import pack, unpack
from rookery.registry import families
from rookery.state import State, fingerprint_of


class LanguageModel(nn.Module):
    """Base of the models: a family defines `init_state`, `features`, `head` and `init_weights`.

    `logits, state = model(tokens, state)` reads any number of tokens, from one to a whole document, zero included.
    """

    family: str
    """Registered name of the family."""
    config: Any
    """The frozen config that the model was built from."""
    head: nn.Module
    """features -> logits."""
    static_step = False
    """True where reading one token is the same work on tensors of the same shapes whatever was read before, so that a
    CUDA graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_drop_unused)
        self._aliases: dict[str, str] = {}

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits [b, t, vocab] for int tokens [b, t], and the state after them. The state given is never changed.

        `cu_seqlens` [documents + 1]: the one row holds documents one after the other, each with its own row of state.
        `mask` [b, t], true at real tokens: rows of unequal length, padded anywhere; logits of padding are zero.
        """
        if mask is None:
            features, state = self.features(tokens, state, cu_seqlens)
            return self.head(features), state
        if cu_seqlens is not None:
            raise ValueError("give cu_seqlens for packed documents or mask for padded rows, not both")
        packed = pack(tokens, mask)
        features, state = self.features(packed.tokens, state, packed.cu_seqlens)
        return unpack(self.head(features), packed.mask), state

    def features(self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        """The last norm's output [b, t, c], and the state after it: `forward` without the head."""
        raise NotImplementedError

    def last_features(self, tokens: Tensor, state: State | None, count: int) -> tuple[Tensor, State]:
        """`features` of the last `count` tokens alone: families that can save the rest of the work for them do."""
        features, state = self.features(tokens, state, None)
        return features[:, max(0, tokens.shape[1] - count) :], state

    def init_state(self, batch: int = 1) -> State:
        """The state before the first token, for `batch` rows."""
        raise NotImplementedError

    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Names these weights in state files (see `rookery.checkpoints.state_file.fingerprint`)."""
        weights = (w.full_tensor() if hasattr(w, "full_tensor") else w for w in self.fingerprint_weights())
        computed = fingerprint_of(self.family, self.config, *weights)
        return self._aliases.get(computed, computed)

    def known_as(self, fingerprint: str) -> None:
        """Lets the weights as they are now go by `fingerprint`: a rounded copy reads the states of its original.

        Other weights, such as these after training, are another model again.
        """
        self._aliases.clear()
        self._aliases[self.fingerprint()] = fingerprint

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        """The embedding matrix and the last norm's weight."""
        raise NotImplementedError

    def check_tokens(self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        """The state to start from; ValueError where tokens, state, model and cu_seqlens do not fit together."""
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens must be [batch, time], got shape {list(tokens.shape)}; add a batch with tokens[None]"
            )
        if cu_seqlens is not None:
            check_cu_seqlens(tokens, cu_seqlens)
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is None:
            return self.init_state(rows)
        state.check_model(self.config)
        if state.batch != rows:
            raise ValueError(f"the state has {state.batch} rows, the tokens {rows}")
        return state


def check_cu_seqlens(tokens: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError unless `cu_seqlens` cuts the one row of `tokens` into documents.

    On a GPU it is believed: looking at it would wait for all that the GPU has to do.
    """
    if tokens.shape[0] != 1:
        raise ValueError(f"packed documents need one row of tokens, got {tokens.shape[0]}")
    if cu_seqlens.is_cuda:
        return
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens.shape[1] or sorted(ends) != ends:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens.shape[1]} tokens of the row, got {ends}")


def _drop_unused(module: LanguageModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets official state dicts load strictly: tensors that they carry and nobody uses are taken out."""
    family = families()[module.family]
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if family.is_unused(own) or family.is_idle(module.config, own):
            del state_dict[name]
