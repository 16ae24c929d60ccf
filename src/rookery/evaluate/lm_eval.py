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

from rookery.errors import MissingDependency
from rookery.evaluate.scoring import Request, Scorer
from rookery.models import load
from rookery.nn.language_model import LanguageModel
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import resolve

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingDependency('this needs lm-eval: pip install "rookery[eval]"') from None


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
        return [self._generate(*request.args) for request in requests]

    @torch.inference_mode()
    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        if options.get("do_sample") and options.get("temperature", 0):
            raise ValueError("this model answers greedily: tasks that sample (do_sample) are not supported")
        device = next(self.model.parameters()).device
        following, state, said = self._begun(self.tok_encode(context)), None, []
        for _ in range(int(options.get("max_gen_toks", self.max_gen_toks))):
            features, state = self.model.features(torch.tensor([following], device=device), state, None)
            token = int(self.model.head(features[0, -1]).argmax())
            if token == self.eot_token_id:
                break
            said.append(token)
            following = [token]
            text = self.tokens.decode(said)
            if any(stop and stop in text for stop in until):
                break
        text = self.tokens.decode(said)
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text

    def _begun(self, context: Sequence[int]) -> list[int]:
        """The context behind the token that ends a text; lm-eval puts it there itself where there is no context."""
        begin = self.eot_token_id
        return list(context) if context and context[0] == begin else [begin, *context]
