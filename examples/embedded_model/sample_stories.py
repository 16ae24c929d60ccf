"""Samples children's stories from the BabyLlama teacher: the corpus of the embedded model.

    python examples/embedded_model/sample_stories.py MODEL.bin VOCAB out/stories --characters 30_000_000

Every row of the batch is an endless stream of stories, as the teacher was trained: windows of 256 characters, the last
128 carried over into the next. Each finished story is written as one JSON line with its mean log-likelihood under the
teacher, so that the choice of the better ones is a separate step. Batches are appended; the same command goes on where
it stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from rookery.checkpoints.llama2c import read_llama2c
from rookery.models import build
from rookery.models.transformer import Transformer, rotate
from rookery.registry import families
from rookery.state import State, from_numpy

BOS, NEWLINE, SPACE = 1, 0, "\u2581"
WINDOW, CARRIED = 256, 128


def load_teacher(path: Path) -> Transformer:
    config, weights = read_llama2c(path)
    model = build(families()["transformer"], config)
    tensors = {name: from_numpy(weight) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def read_vocabulary(path: Path) -> list[str]:
    """Characters by id; the file has one "piece <tab> score" a line."""
    pieces = [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    pieces = [" " if p == SPACE else p for p in pieces]
    pieces[NEWLINE] = "\n"
    return pieces


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token per row and its log-probability under the untouched distribution."""
    logits = logits.float()
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p * (p.cumsum(-1) - p < top_p)
    chosen = order.gather(1, torch.multinomial(p, 1, generator=generator))
    return chosen, logits.log_softmax(-1).gather(1, chosen)


class Cache:
    """Key/value buffers of one window that `step` fills in place.

    The model's own functional state would copy every cache at every character, which is half of the time here.
    """

    def __init__(self, model: Transformer, rows: int) -> None:
        config = model.config
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, WINDOW, config.head_dim)
        self.keys, self.values, self.length = torch.zeros(shape), torch.zeros(shape), 0

    def fill(self, state: State) -> None:
        """Takes over a prefilled state."""
        self.length = state.layers[0].keys.shape[2]
        for i, layer in enumerate(state.layers):
            self.keys[i, :, :, : self.length] = layer.keys
            self.values[i, :, :, : self.length] = layer.values


def step(model: Transformer, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits after one more token in every row; the test compares it with `model(tokens, state)`."""
    groups = model.config.num_key_value_heads
    position = torch.full((1, 1), cache.length)
    x = model.model.embed_tokens(tokens)
    for i, block in enumerate(model.model.layers):
        attention, normed = block.self_attn, block.input_layernorm(x)
        q, k = (
            rotate(attention.heads(proj(normed)), position, model.config.rope_theta)
            for proj in (attention.q_proj, attention.k_proj)
        )
        cache.keys[i, :, :, cache.length] = k[:, :, 0]
        cache.values[i, :, :, cache.length] = attention.heads(attention.v_proj(normed))[:, :, 0]
        keys, values = (part[i, :, :, : cache.length + 1] for part in (cache.keys, cache.values))
        weights = (q[:, :, 0].unflatten(1, (groups, -1)) @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + attention.o_proj((weights @ values).flatten(1)[:, None])
        x = x + block.mlp(block.post_attention_layernorm(x))
    cache.length += 1
    return model.head(model.model.norm(x))[:, -1]


@torch.inference_mode()
def sample_streams(
    model: Transformer, rows: int, windows: int, temperature: float, top_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, [rows, time] each; column 0 is the token BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens, scores = [torch.full((rows, 1), BOS)], [torch.zeros(rows, 1)]
    cache = Cache(model, rows)
    for _ in range(windows):
        context = torch.cat(tokens[-CARRIED:], dim=1)
        all_logits, state = model(context)
        cache.fill(state)
        logits = all_logits[:, -1]
        for _ in range(WINDOW - context.shape[1]):
            chosen, score = draw(logits, temperature, top_p, generator)
            tokens.append(chosen)
            scores.append(score)
            logits = step(model, chosen, cache)
    return torch.cat(tokens, dim=1), torch.cat(scores, dim=1)


def stories(tokens: list[int], scores: list[float], pieces: list[str]) -> list[dict]:
    """Finished stories of one stream, with the mean log-probability of their characters."""
    starts = [i for i, token in enumerate(tokens) if token == BOS]
    found = []
    for start, end in zip(starts, starts[1:]):
        text = "".join(pieces[t] for t in tokens[start + 1 : end]).strip()
        found.append({"text": text, "score": sum(scores[start + 1 : end + 1]) / (end - start)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=30_000_000)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    given = parser.parse_args()
    model, pieces = load_teacher(given.model), read_vocabulary(given.vocabulary)
    given.out.mkdir(parents=True, exist_ok=True)
    written, batch = 0, 0
    while written < given.characters:
        path = given.out / f"{batch:04d}.jsonl"
        if not path.exists():
            begun = time.perf_counter()
            tokens, scores = sample_streams(
                model, given.rows, given.windows, given.temperature, given.top_p, seed=batch
            )
            found = [s for row in zip(tokens.tolist(), scores.tolist()) for s in stories(*row, pieces)]
            path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in found), encoding="utf-8")
            rate = tokens.numel() / (time.perf_counter() - begun)
            print(f"{path.name}: {len(found)} stories, {rate:,.0f} characters/s", file=sys.stderr)
        written += path.stat().st_size
        batch += 1


if __name__ == "__main__":
    main()
