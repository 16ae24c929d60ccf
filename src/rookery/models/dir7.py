"""DIR-7 (arXiv 2504.14260): text, CrossWKV in its modes, block, model.

The paper's receptance comes from the text and everything else from the image, so that text never enters the state
(`text_r`). Ours, `text_kv`, reads the text first: it writes the state that the image then reads. Parameters of modes
that have the same part have the same names.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rookery.families.dir7 import FAMILY, DIR7Config
from rookery.models.diffusion import ATTENTION_GAIN, Block, DiffusionModel, Grid
from rookery.models.rwkv5 import head_norm
from rookery.models.rwkv7 import TimeMix, initial_2025_05
from rookery.models.vision import SpatialMix7
from rookery.nn.grid import ORDERS, scan, unscan
from rookery.nn.initial import normal_
from rookery.nn.rwkv import set_matrices, set_vectors
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7_inputs import wkv7_inputs

# b batch, t image tokens, l text tokens, d numbers of a text token, c width, h heads, n channels of a head


class Text(NamedTuple):
    """Texts of a batch, padded to one length."""

    features: Tensor
    """[b, l, d]"""
    mask: Tensor
    """bool [b, l], true where there is a token"""


class Prompt(NamedTuple):
    """What the blocks keep of a text. It depends on nothing else, so it serves every step and every image."""

    layers: tuple[tuple[Tensor, ...], ...]
    """For each block a state [b, h, value, key], or what its mode needs instead."""
    pooled: Tensor | None
    """[b, c], what is added to the noise level"""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for layer in self.layers for t in layer] + ([] if self.pooled is None else [self.pooled])
        return sum(t.numel() * t.element_size() for t in tensors)

    def select(self, rows: Tensor) -> "Prompt":
        """The prompts of these rows, int [k], in this order; rows may repeat."""
        layers = tuple(tuple(t.index_select(0, rows) for t in layer) for layer in self.layers)
        return Prompt(layers, None if self.pooled is None else self.pooled.index_select(0, rows))


def join(prompts: Sequence[Prompt]) -> Prompt:
    """Several prompts as one batch. Modes that keep the text's tokens need prompts of one length."""
    layers = tuple(tuple(map(torch.cat, zip(*layer))) for layer in zip(*(prompt.layers for prompt in prompts)))
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    return Prompt(layers, torch.cat(pooled) if pooled else None)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words_of(text: str) -> list[str]:
    """Words in lower case, and signs; a digit that stands alone is spelled."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    return [DIGITS[int(word)] if len(word) == 1 and word in "0123456789" else word for word in found]


def bucket(word: str, buckets: int) -> int:
    """The row of a word in a table of `buckets`."""
    return zlib.crc32(word.encode()) % buckets


def valid_only(x: Tensor, mask: Tensor) -> Tensor:
    """`x` [b, l, ...] with zeros for tokens that are not there."""
    return x * mask.view(*mask.shape, *[1] * (x.dim() - 2)).to(x)


def to_the_right(text: Text) -> Text:
    """The tokens that are there, in their order, at the end of each row."""
    order = text.mask.to(torch.int64).argsort(dim=1, stable=True)
    features = text.features.gather(1, order[..., None].expand_as(text.features))
    mask = text.mask.gather(1, order)
    return Text(valid_only(features, mask), mask)


class BothWays:
    """RWKV-7's recurrence forwards and backwards, added."""

    def __call__(self, *, state: Tensor | None, cu_seqlens: Tensor | None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        assert state is None
        assert cu_seqlens is None
        batch = len(inputs["r"])
        y, last = wkv7(**{name: torch.cat([x, x.flip(1)]) for name, x in inputs.items()})
        return y[:batch] + y[batch:].flip(1), last


class SelfMix(SpatialMix7):
    """RWKV-7's time mix on the image, through the grid in one of four orders or in both directions."""

    def __init__(self, config: DIR7Config, layer: int) -> None:
        super().__init__(config, layer)
        self.removal = config.removal
        if config.directions == "both":
            self.recurrence = BothWays()


class TextKV(TimeMix):
    """One recurrence over the text and then the image: the text writes a state, the image goes on with it."""

    def __init__(self, config: DIR7Config, layer: int) -> None:
        super().__init__(config, layer)
        self.removal = config.removal
        self.order = ORDERS[layer % 2]
        self.text = nn.Linear(config.text_size, config.hidden_size, bias=False)

    def read(self, text: Text, before: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """The state [b, h, value, key] that a text leaves; tokens that are not there change nothing.

        `before` is what an earlier part of the text left.
        """
        return (text_state(self, text, *before),)

    def forward(
        self, x: Tensor, grid: Grid, memory: tuple[Tensor, ...], v_first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output [b, t, c] and the first block's values, both in the order of rows."""
        mixed, _ = token_shift(x=scan(x, self.order, grid), mix=self.mixes())
        first = None if v_first is None else scan(v_first, self.order, grid)
        y, _, first = self.attend(mixed, memory[0], first)
        return unscan(y, self.order, grid), unscan(first, self.order, grid)


def text_state(mix: Any, text: Text, state: Tensor | None = None) -> Tensor:
    """The state after a text, from the projections of `mix` and the state before it; no decay if the config says so."""
    config = mix.config
    h = mix.text(text.features)
    rate_logit = mix.a0 + h @ mix.a1 @ mix.a2
    decay_logit = mix.w0 + (h @ mix.w1).tanh() @ mix.w2 if config.text_decay else rate_logit
    heads = (-1, config.head_dim)
    k, v = mix.key(h), mix.value(h).unflatten(-1, heads)
    log_w, k, a, b = wkv7_inputs(
        k=k,
        decay_logit=decay_logit,
        rate_logit=rate_logit,
        k_k=mix.k_k.flatten(),
        k_a=mix.k_a.flatten(),
        head_dim=config.head_dim,
    )
    if not config.text_decay:
        log_w = torch.zeros_like(log_w)
    log_w, k, v, b = (valid_only(x, text.mask) for x in (log_w, k, v, b * config.removal))
    if state is None:
        wide = torch.promote_types(h.dtype, torch.float32)
        state = h.new_zeros(len(h), config.num_heads, config.head_dim, config.head_dim, dtype=wide)
    if not text.mask.shape[1]:
        return state
    return wkv7(r=torch.zeros_like(k), log_w=log_w, k=k, v=v, a=a, b=b, state=state)[1]


class TextRead(nn.Module):
    """The text writes a state that the image only reads: every token by itself, so their order does not matter."""

    def __init__(self, config: DIR7Config, layer: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.text = nn.Linear(config.text_size, width, bias=False)
        low = {"w": config.decay_rank, "a": config.rate_rank, "g": config.gate_rank}
        for name in "wag" if config.text_decay else "ag":
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, low[name])))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(low[name], width)))
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, width)))
        self.k_k, self.k_a = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ln_x = nn.GroupNorm(config.num_heads, width, eps=config.group_norm_eps)

    def read(self, text: Text, before: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """As `TextKV.read`."""
        return (text_state(self, text, *before),)

    def look_up(self, x: Tensor, state: Tensor) -> Tensor:
        """S r for every token, [b, t, h, n]."""
        r = self.receptance(x).unflatten(-1, (-1, self.config.head_dim))
        return torch.einsum("bhvk,bthk->bthv", state, r.to(state)).to(x.dtype)

    def forward(
        self, x: Tensor, grid: Grid, memory: tuple[Tensor, ...], v_first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        gate = (x @ self.g1).sigmoid() @ self.g2
        return self.output(head_norm(self.ln_x, self.look_up(x, memory[0])) * gate), v_first


class TextR(TimeMix):
    """The paper's form: image tokens write the state, the text's tokens say what is read of it.

    Laid at the end (`left_pad`), a text of l tokens reaches the last l image tokens only, and must not be longer than
    the image. ValueError where it is.
    """

    def __init__(self, config: DIR7Config, layer: int) -> None:
        super().__init__(config, layer)
        del self.x_r
        self.removal = config.removal
        self.order = ORDERS[layer % 2]
        self.receptance = nn.Linear(config.text_size, config.hidden_size, bias=False)

    def mixes(self) -> Tensor:
        return torch.cat([self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]).flatten(1)

    def read(self, text: Text) -> tuple[Tensor, ...]:
        """The text itself, its tokens at the right end."""
        return tuple(to_the_right(text))

    def forward(
        self, x: Tensor, grid: Grid, memory: tuple[Tensor, ...], v_first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        receptance = self.laid_out(Text(*memory), x.shape[1])
        mixed, _ = token_shift(x=scan(x, self.order, grid), mix=self.mixes())
        first = None if v_first is None else scan(v_first, self.order, grid)
        y, _, first = self.attend((receptance, *mixed), None, first)
        return unscan(y, self.order, grid), unscan(first, self.order, grid)

    def laid_out(self, text: Text, tokens: int) -> Tensor:
        """The text's features for every image token, [b, t, d]."""
        features, longest = text.features, int(text.mask.sum(dim=1).max()) if text.mask.numel() else 0
        if self.config.align == "left_pad":
            if longest > tokens:
                raise ValueError(
                    f"the text has {longest} tokens and the image {tokens}: with cross='text_r' a text cannot be "
                    "longer than the image; shorten it, use align='interpolate', or cross='text_kv' for any length"
                )
            kept = features[:, max(0, features.shape[1] - tokens) :]
            return torch.cat([kept.new_zeros(len(kept), tokens - kept.shape[1], kept.shape[2]), kept], dim=1)
        return stretched(text, tokens)


def stretched(text: Text, tokens: int) -> Tensor:
    """Features [b, tokens, d] of texts whose tokens are at the right end, by linear interpolation between them."""
    lengths = text.mask.sum(dim=1, keepdim=True)
    places = (torch.arange(tokens, device=lengths.device) + 0.5) * lengths / tokens - 0.5
    places = places.clamp(min=0).minimum((lengths - 1).clamp(min=0).to(places))
    low = places.floor()
    weight = (places - low)[..., None].to(text.features)
    low = low.long()
    high = torch.minimum(low + 1, (lengths - 1).clamp(min=0))
    if not text.mask.shape[1]:
        return text.features.new_zeros(len(lengths), tokens, text.features.shape[2])
    rows = torch.arange(len(lengths), device=lengths.device)[:, None]
    first = (text.mask.shape[1] - lengths).clamp(max=text.mask.shape[1] - 1)
    below, above = (text.features[rows, first + place] for place in (low, high))
    return below.lerp(above, weight)


class Softmax(nn.Module):
    """Cross-attention, the baseline: keys and values of every text token are kept."""

    def __init__(self, config: DIR7Config, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, text = config.hidden_size, config.text_size
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(text, width, bias=False) for _ in range(2))
        self.output = nn.Linear(width, width, bias=False)

    def read(self, text: Text) -> tuple[Tensor, ...]:
        """Keys and values [b, l, c] and the mask."""
        return self.key(text.features), self.value(text.features), text.mask

    def forward(
        self, x: Tensor, grid: Grid, memory: tuple[Tensor, ...], v_first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        keys, values, mask = memory
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.query(x), keys, values))
        if not mask.shape[1]:
            return torch.zeros_like(x), v_first
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        y = y * mask.any(dim=1).view(-1, 1, 1, 1).to(y)  # without a token there is nothing to average
        return self.output(y.nan_to_num().transpose(1, 2).flatten(2)), v_first


CROSSES = {"text_kv": TextKV, "text_read": TextRead, "text_r": TextR, "softmax": Softmax}


class TextBlock(Block):
    """Self-mix, then the text, then the channel mix."""

    def __init__(self, config: DIR7Config, layer: int, *, reads_skip: bool) -> None:
        super().__init__(config, layer, reads_skip=reads_skip)
        if config.cross != "none":
            self.ln_cross = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.cross = CROSSES[config.cross](config, layer)

    @staticmethod
    def mixer(config: DIR7Config, layer: int) -> nn.Module:
        return SelfMix(config, layer)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        c: Tensor,
        firsts: tuple[Tensor | None, Tensor | None],
        skip: Tensor | None = None,
        memory: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """As `Block.forward`; `firsts` are the first block's values of the self-mix and of the cross layer."""
        x = self.enter(x, skip)
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x, v_first = self.attend(x, grid, parts, firsts[0])
        cross_first = firsts[1]
        if hasattr(self, "cross"):
            read, cross_first = self.cross(self.ln_cross(x), grid, memory, cross_first)
            x = x + read
        return self.feed(x, grid, parts), (v_first, cross_first)


class DIR7(DiffusionModel):
    """DIR-7: the condition is a `Text`, a `Prompt` that `read` made of one, or None for the null prompt."""

    family = FAMILY.name

    def __init__(self, config: DIR7Config) -> None:
        super().__init__(config)
        if config.text_buckets:
            self.text_embed = nn.Embedding(config.text_buckets, config.text_size)
        if config.null == "learned":
            self.text_null = nn.Parameter(torch.empty(config.text_size))
        if config.pooled_text:
            self.text_pool = nn.Linear(config.text_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(TextBlock(config, i, reads_skip=i >= config.first_reader) for i in layers)

    def words(self, prompts: Sequence[str]) -> Text:
        """The prompts by the model's own table of words. ValueError for a model without, or where no word is known."""
        ids, mask = self.word_ids(prompts)
        known = self.text_embed.weight.detach().any(dim=1)[ids] & mask
        for i in (mask.any(dim=1) & ~known.any(dim=1)).nonzero().flatten().tolist():
            raise ValueError(f"the model has learned none of the words of {prompts[i]!r}")
        return Text(self.text_embed(ids), mask)

    def word_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rows of the table [b, l] for the words of each prompt, and the mask of the words that are there."""
        buckets = self.config.text_buckets
        if not buckets:
            raise ValueError("this model has no table of words: give it features of a text encoder (`Text`)")
        rows = [[bucket(word, buckets) for word in words_of(prompt)] for prompt in prompts]
        longest = max(map(len, rows), default=0)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(longest) < lengths[:, None]
        device = self.pos_embed.device
        return ids.view(len(rows), longest).to(device), mask.to(device)

    @torch.no_grad()
    def keep_words(self, prompts: Iterable[str]) -> None:
        """Forgets, in the model's own table, every word that is in none of these prompts: zeros mean unknown."""
        rows = {bucket(word, self.config.text_buckets) for prompt in prompts for word in words_of(prompt)}
        for row in set(range(self.config.text_buckets)) - rows:
            self.text_embed.weight[row] = 0

    def read(self, text: Text) -> Prompt:
        """What the blocks need of a text: in the recurrent modes a state of one size for a text of any length."""
        self.check_text(text)
        layers = tuple(block.cross.read(text) for block in self.blocks) if self.config.cross != "none" else ()
        if not self.config.pooled_text:
            return Prompt(layers, None)
        total = valid_only(text.features, text.mask).sum(dim=1)
        mean = total / text.mask.sum(dim=1, keepdim=True).clamp(min=1).to(total)
        return Prompt(layers, self.text_pool(mean))

    def null(self, batch: int) -> Text:
        size, like = self.config.text_size, self.like
        if self.config.null == "empty":
            return Text(like.new_zeros(batch, 0, size), like.new_zeros(batch, 0, dtype=torch.bool))
        return Text(self.text_null.expand(batch, 1, size), like.new_ones(batch, 1, dtype=torch.bool))

    def dropped(self, text: Text, drop: Tensor) -> Text:
        """The texts, but the null prompt in the rows where `drop` [b] is true."""
        null = self.null(len(drop))
        missing = null.mask.shape[1] - text.mask.shape[1]
        if missing > 0:
            text = Text(
                torch.cat([text.features, text.features.new_zeros(len(drop), missing, text.features.shape[2])], dim=1),
                torch.cat([text.mask, text.mask.new_zeros(len(drop), missing)], dim=1),
            )
        first = torch.zeros_like(text.mask)
        first[:, : null.mask.shape[1]] = True
        features = (
            torch.where((first & drop[:, None])[..., None], null.features[:, :1], text.features)
            if null.mask.shape[1]
            else text.features
        )
        return Text(features, torch.where(drop[:, None], first, text.mask))

    def run(self, x: Tensor, grid: Grid, c: Tensor, condition: Text | Prompt) -> tuple[Tensor, Tensor]:
        prompt = condition if isinstance(condition, Prompt) else self.read(condition)
        rows = {len(t) for layer in prompt.layers for t in layer} | (
            {len(x)} if prompt.pooled is None else {len(prompt.pooled)}
        )
        if rows != {len(x)}:
            raise ValueError(f"there are texts for {sorted(rows - {len(x)})[0]} images, and {len(x)} images")
        if prompt.pooled is not None:
            c = c + prompt.pooled
        firsts, skips, blocks = (None, None), [], len(self.blocks)
        for i, block in enumerate(self.blocks):
            skip = skips.pop() if i >= self.config.first_reader else None
            memory = prompt.layers[i] if prompt.layers else ()
            x, firsts = block(x, grid, c, firsts, skip, memory)
            if i < blocks - self.config.first_reader:
                skips.append(x)
        return x, c

    def check_text(self, text: Text) -> None:
        size = self.config.text_size
        if text.features.dim() != 3 or text.features.shape[2] != size or text.features.shape[:2] != text.mask.shape:
            raise ValueError(
                f"a text is features [batch, tokens, {size}] with a mask [batch, tokens]; got "
                f"{list(text.features.shape)} and {list(text.mask.shape)}"
            )

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """As `DiffusionRWKV.init_weights`, and below; the same for the same seed.

        | parameter | value |
        |---|---|
        | vectors and matrices of `cross` | as in RWKV-7, the decay and rate that of its first block |
        | `cross.output` | 0: a fresh layer changes nothing |
        | words, null prompt | N(0, 1) |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_shared(list(self.blocks), generator)
        for layer, block in enumerate(self.blocks):
            if self.config.cross == "none":
                break
            there = {name for name, _ in block.cross.named_parameters()}
            vectors = {n[4:]: v for n, v in initial_2025_05(self.config, layer).items() if n.startswith("att.")}
            set_vectors(block.cross, {n: v for n, v in vectors.items() if n in there})
            if self.config.cross != "softmax":
                gains = {n[4:]: g for n, g in ATTENTION_GAIN.items() if n[4:] in there}
                set_matrices(block.cross, gains, generator)
            block.cross.output.weight.zero_()
        if self.config.text_buckets:
            normal_(self.text_embed.weight, 1.0, generator)
        if self.config.null == "learned":
            normal_(self.text_null, 1.0, generator)
