"""Our models in EleutherAI's lm-evaluation-harness: `lm_eval --model rookery` once this file is imported.

    from rookery.evaluate.lm_eval import RookeryLM
    lm_eval.simple_evaluate(model=RookeryLM("model.pth"), tasks=["arc_easy"])

Requests that begin alike, as those of one task with examples do, are read once up to where they part. A rolling
log-likelihood is that of the whole text, with the state carried along: nothing is cut into windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rookery.errors import MissingDependency
from rookery.evaluate.scoring import Request, Scorer
from rookery.models import load
from rookery.nn.language_model import LanguageModel
from rookery.state import State, cat
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import resolve

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingDependency('this needs lm-eval: pip install "rookery[eval]"') from None


AT_ONCE = 32
"""Answers that are written together."""


@register_model("rookery")
class RookeryLM(TemplateLM):
    """A model and its tokenizer as lm-eval wants them."""

    def __init__(
        self,
        pretrained: str | LanguageModel = "",
        *,
        tokenizer: str | Tokenizer | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        budget: int = 4096,
        max_gen_toks: int = 256,
        reuse: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """`pretrained` is a model, or a file, folder or Hub id of one; `budget` the tokens of a call.

        `batch_size` is what the harness passes; what limits a call here is `budget`.
        """
        super().__init__()
        if isinstance(pretrained, str):
            if not pretrained:
                raise ValueError("give pretrained=MODEL: a file, a folder or a Hub id")
            from rookery.checkpoints import open_checkpoint

            told = open_checkpoint(pretrained).metadata
            model = load(pretrained, device=device, dtype=getattr(torch, dtype) if dtype else None)
            path = pretrained
        else:
            model, told, path = pretrained, {}, None
        self.model = model.eval()
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = resolve(tokenizer, vocab_size=model.config.vocab_size, path=path, metadata=told)
        self.tokens = tokenizer
        self.scorer = Scorer(self.model, budget=budget, reuse=reuse)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Nothing is added: token 0 is put before contexts when they are scored."""
        return self.tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation, and whether greedy decoding would say it."""
        scores = self.scorer.score([Request(self._begun(context), target) for _, context, target in requests])
        answers = [(score.log_prob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text behind token 0."""
        texts = [request.args[0] for request in requests]
        scores = self.scorer.score([Request([self.eot_token_id], self.tok_encode(text)) for text in texts])
        for text, score in zip(texts, scores):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score.log_prob)
        return [score.log_prob for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says behind each context, up to the first of the request's stop strings."""
        answers: list[str] = []
        for part in _few([request.args for request in requests], AT_ONCE):
            answers += self._generate(part)
        return answers

    @torch.inference_mode()
    def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Answers to several requests, which are written together; one that is done leaves the batch."""
        answers = [Answer(self.tokens, options, self.max_gen_toks) for _, options in asked]
        contexts = [self._begun(self.tok_encode(context)) for context, _ in asked]
        features, state = self._read(contexts)
        rows = list(range(len(asked)))
        while True:
            tokens = self.model.head(features).argmax(dim=-1).tolist()
            going = [i for i, (row, token) in enumerate(zip(rows, tokens)) if answers[row].goes_on(token)]
            if not going:
                return [answer.text for answer in answers]
            if len(going) < len(rows):
                rows, tokens, state = [rows[i] for i in going], [tokens[i] for i in going], state.select(going)
            following = torch.tensor(tokens, device=features.device)[:, None]
            features, state = self.model.features(following, state, None)
            features = features[:, -1]

    def _read(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        """Features of the last token of each context [n, c], and their states, one context at a time."""
        device = next(self.model.parameters()).device
        features, states = [], []
        for context in contexts:
            state = None
            for piece in _few(context, self.scorer.budget):
                found, state = self.model.features(torch.tensor([piece], device=device), state, None)
            features.append(found[0, -1])
            states.append(state)
        return torch.stack(features), cat(states)

    def _begun(self, context: Sequence[int]) -> list[int]:
        """The context behind the token that ends a text; lm-eval puts it there itself where there is no context."""
        begin = self.eot_token_id
        return list(context) if context and context[0] == begin else [begin, *context]


class Answer:
    """What has been said to one request so far."""

    def __init__(self, tokenizer: Tokenizer, options: dict[str, Any], most: int) -> None:
        if options.get("do_sample") and options.get("temperature", 0):
            raise ValueError("this model answers greedily: tasks that sample (do_sample) are not supported")
        until = options.get("until") or []
        self.tokenizer = tokenizer
        self.until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        self.left = int(options.get("max_gen_toks", most))
        self.said: list[int] = []

    def goes_on(self, token: int) -> bool:
        """Takes the next token; whether another one is wanted."""
        if token == self.tokenizer.eos_id or self.left == 0:
            return False
        self.said.append(token)
        self.left -= 1
        whole = self.tokenizer.decode(self.said)
        return self.left > 0 and not any(stop in whole for stop in self.until)

    @property
    def text(self) -> str:
        """The answer before its first stop string."""
        text = self.tokenizer.decode(self.said)
        return min((text.split(stop)[0] for stop in self.until), key=len, default=text)


def _few(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [items[i : i + most] for i in range(0, len(items), most)]
