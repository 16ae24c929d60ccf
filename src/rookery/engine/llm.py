"""The front door: a model that takes text and gives text."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rookery.checkpoints import hub
from rookery.checkpoints.pack import FORMATS
from rookery.engine.session import CHUNK, END_OF_TEXT, Session
from rookery.errors import BackendUnavailable, BadCheckpoint, BadTokenizer, MissingDependency, UnknownName, unknown
from rookery.registry import families_in_order

if TYPE_CHECKING:
    from rookery.checkpoints.checkpoint import Checkpoint
    from rookery.checkpoints.tuned_state import TunedState
    from rookery.engine.beam import Beam
    from rookery.engine.grammar import Guide
    from rookery.engine.runners.protocol import RowState, Runner
    from rookery.engine.state_cache import StateCache
    from rookery.tokenizers import Tokenizer
    from rookery.tokenizers.chat import ChatTemplate

log = logging.getLogger("rookery")

EMBEDDED = Path(__file__).parents[1] / "assets" / "embedded"
"""Folder of the model that comes with the package."""


class LLM:
    """A language model, ready to generate. Without a path, the small one that comes with the package.

    `path` is a model file or folder of any format that `open_checkpoint` reads; weights keep the file's precision,
    or `quantize` ("int8", "int4") makes the large ones smaller and the model faster.
    `threads` (all cores, or one for a small model) is for the CPU, `isa` ("avx2", …; the best one that the machine
    has) for the compiled runtime. `device` ("cpu", "cuda", …) runs the model with torch there; without it torch runs
    what the compiled runtime does not know. `tokenizer` is a tokenizer, or the name or file of one; left out, it is
    found when text is first needed. `template` names the form of a conversation that the model was trained on ("g1",
    "world", "raven"), where its file name does not tell. `adapter` is a file of RWKV-PEFT or a folder of peft
    that is merged into the weights, `adapter_alpha` the alpha of a LoRA whose file does not say it. `adapters` (name ->
    file) are not merged: each text says which it wants (`generate("…", adapter="name")`), and texts of one batch may
    have different ones; see `adapted`.
    `settings` are fields of the model's config that no file tells, as {"bits": 4} for a 4-bit ROSA model. `lean`, for
    compressed models on the compiled runtime, holds no more of the file in memory than tokens need. `preload` reads
    all weights into memory at the start instead of mapping them (see `NativeRunner`): later there, then faster. Raises
    BadCheckpoint for what is no model, BackendUnavailable or MissingDependency for what cannot run here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        quantize: str | None = None,
        threads: int | None = None,
        isa: str | None = None,
        device: str | None = None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        template: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        adapter_alpha: float | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        settings: Mapping[str, Any] | None = None,
        lean: bool = False,
        preload: bool = False,
    ) -> None:
        if quantize is not None and quantize not in FORMATS:
            supported = ", ".join(map(repr, FORMATS))
            raise UnknownName(f"quantize={quantize!r} is not supported; supported: {supported}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}; leave it out to let the model's size decide")
        from rookery.checkpoints.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(model_path(path), settings=settings)
        if adapter is not None:
            from rookery.checkpoints.adapter import adapted

            checkpoint = adapted(checkpoint, adapter, alpha=adapter_alpha)
        self._set(_runner(checkpoint, threads, isa, device, quantize, lean, preload), checkpoint, tokenizer, template)
        for name, file in (adapters or {}).items():
            self.adapters[name] = self.adapted(file, alpha=adapter_alpha)

    @classmethod
    def from_runner(
        cls,
        runner: Runner,
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        template: str | None = None,
    ) -> LLM:
        """An LLM on a model that is loaded already, as `TorchRunner(model)` holds one."""
        llm = cls.__new__(cls)
        llm._set(runner, None, tokenizer, template)
        return llm

    def _set(
        self,
        runner: Runner,
        checkpoint: Checkpoint | None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None,
        template: str | None,
    ) -> None:
        self.runner = runner
        """What runs the model; its `config` says the sizes."""
        self.path = Path(checkpoint.path) if checkpoint else None
        """The model's file or folder, if it came from one."""
        self.cache: StateCache | None = None
        """Set one, and prompts are not read twice: `llm.cache = StateCache(1 << 30)`."""
        self.adapters: dict[str, LLM] = {}
        """The model with adapters, by name: `llm.adapters["mine"] = llm.adapted("mine.pth")`; `del` forgets one."""
        self._metadata = checkpoint.metadata if checkpoint else {}
        self._start = _start(checkpoint, runner) if checkpoint else None
        self._tokenizer, self._template = tokenizer, template

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; BadTokenizer where none can be found."""
        if self._tokenizer is not None and not isinstance(self._tokenizer, str | os.PathLike):
            return self._tokenizer
        from rookery.tokenizers import resolve

        vocab_size = self.runner.config.vocab_size
        return resolve(self._tokenizer, path=self.path, vocab_size=vocab_size, metadata=self._metadata)

    @cached_property
    def end_of_text(self) -> int:
        """The token that ends a text: 0 in all RWKV vocabularies, the tokenizer's own for converted transformers."""
        family = next((family for family in families_in_order() if family.name == self.runner.family), None)
        if family is None or family.fingerprinted[0] != "model.embed_tokens.weight":
            return END_OF_TEXT
        try:
            return self.tokenizer.eos_id
        except (BadTokenizer, MissingDependency):  # token ids work without one
            return END_OF_TEXT

    @cached_property
    def guide(self) -> Guide:
        """What constrained texts need to know of the tokenizer."""
        from rookery.engine.grammar import Guide

        return Guide(self.tokenizer, self.runner.config.vocab_size, self.end_of_text)

    @cached_property
    def template(self) -> ChatTemplate:
        """The form of a conversation; ValueError for a model that was not trained on a known one."""
        from rookery.tokenizers.chat import TEMPLATES, get_template, template_of_model

        name = self._template or template_of_model(self.path.name if self.path else "")
        if name is None:
            which = f"the model {self.path.name!r}" if self.path else "this model"
            raise ValueError(
                f"no chat template is known for {which}: use `generate` to continue a text, or, for a model that was "
                f"trained to converse, name its template with template= or --template: {', '.join(TEMPLATES)}"
            )
        return get_template(name)

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int = 256,
        *,
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
        bos: bool = False,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> Any:
        """The text that follows `prompt` (text or token ids); the options are those of `Session.stream`.

        A list of prompts gives a list of texts, made side by side: the weights are read once for all of them, and what
        prompts have in common is read once. Each text is that of its prompt alone with the same seed; `seed` may be a
        list, too. `bos` begins with token 0, which some models expect at the start of a text. `adapter` names one of
        `adapters`, or one for each prompt of a list (None: no adapter).
        """
        options = {"temperature": temperature, "ignore_eos": ignore_eos, "stop": stop} | sampling
        if _is_list(prompt):
            return self._generate_all(prompt, max_tokens, seed, bos, adapter, options)
        return "".join(self.stream(prompt, max_tokens, bos=bos, adapter=adapter, seed=seed, **options))

    def _generate_all(
        self,
        prompts: Sequence,
        max_tokens: int,
        seed: int | Sequence[int] | None,
        bos: bool,
        adapter: str | Sequence[str | None] | None,
        options: dict[str, Any],
    ) -> list[str]:
        from rookery.engine.scheduler import Scheduler
        from rookery.engine.state_cache import StateCache

        seeds = _of_each(seed, prompts, "seeds", int)
        names = _of_each(adapter, prompts, "adapters", str)
        scheduler = Scheduler(self)
        models = {name: self._with(name) for name in names}
        caches = {name: StateCache() if llm.cache is None else llm.cache for name, llm in models.items()}
        start = [END_OF_TEXT] if bos else []
        texts = [
            scheduler.submit(
                start + self.tokens_of(prompt), max_tokens, llm=models[name], cache=caches[name], seed=seed, **options
            )
            for prompt, seed, name in zip(prompts, seeds, names)
        ]
        return [text.text() for text in texts]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        bos: bool = False,
        adapter: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """As `generate`, piece by piece; each piece is made of whole characters."""
        if adapter is not None:
            return self._with(adapter).stream(prompt, max_tokens, bos=bos, **options)
        tokens = [*([END_OF_TEXT] if bos else []), *self.tokens_of(prompt)]
        if self.cache is None:
            session = self.session()
            session.feed(tokens)
        else:
            from rookery.engine.state_cache import read_prompt

            session = read_prompt(self, tokens, self.cache)
        pieces = session.stream(max_tokens, **options)

        def text() -> Iterator[str]:
            yield from pieces
            if rest := pieces.unfinished():
                yield rest

        return text()

    def session(self, state: str | os.PathLike[str] | None = None, *, adapter: str | None = None) -> Session:
        """A new conversation, or one that goes on from the file `state`: a session's, a state's, or a tuned state.

        Where the model's file carries a tuned state, every new conversation starts from that. `adapter` names one of
        `adapters`, which the session then keeps to.
        """
        llm = self._with(adapter)
        return Session(llm) if state is None else Session.load(llm, state)

    def adapted(self, adapter: str | os.PathLike[str], *, alpha: float | None = None) -> LLM:
        """The same model on the same weights with an adapter that stays beside them, as the merged model would answer.

        Loading costs the adapter's own size and is possible at any time, beside texts that are being written. The
        compiled runtime takes LoRA, rsLoRA, PiSSA, MiSS and mini, on weights of any precision, and sums in one order
        whatever else is in a batch; torch takes DoRA and BAT too. It has no cache yet, since states differ from
        the base's. BadCheckpoint where the adapter does not fit this model, BackendUnavailable for a form that the
        runner cannot swap.
        """
        from rookery.checkpoints.adapter import read_adapter

        llm = self._on_same_weights()
        llm.runner = self.runner.adapted(read_adapter(adapter, alpha=alpha))
        return llm

    def _with(self, adapter: str | None) -> LLM:
        """The model with one of `adapters`."""
        if adapter is not None and adapter not in self.adapters:
            raise unknown("adapter", adapter, self.adapters, "`LLM.adapters`")
        return self if adapter is None else self.adapters[adapter]

    def _on_same_weights(self) -> LLM:
        with contextlib.suppress(BadTokenizer, MissingDependency):  # found once for all; token ids work without one
            _ = self.tokenizer
        llm = copy.copy(self)
        llm.cache, llm.adapters = None, {}
        return llm

    def starting_from(self, state: str | os.PathLike[str]) -> LLM:
        """The same model on the same weights, whose texts all start from the tuned state in a file.

        It has no cache yet, since a prefix leads elsewhere from here. BadState where the file holds no tuned state, or
        that of another model.
        """
        from rookery.checkpoints.tuned_state import read_tuned_state

        llm = self._on_same_weights()
        llm._start = onto_fresh(read_tuned_state(hub.local(state)), self.runner)
        return llm

    def fresh_state(self) -> RowState:
        """The state before the first token: zeros, or the tuned state in the model's file."""
        if self._start is None:
            return self.runner.init_state()
        return self.runner.init_state(self._start)

    def beam_search(
        self, prompt: str | Sequence[int], beams: int = 4, max_tokens: int = 64, **options: Any
    ) -> list[Beam]:
        """The likeliest texts after `prompt`, the best first; see `rookery.engine.beam`."""
        from rookery.engine.beam import beam_search

        return beam_search(self, prompt, beams, max_tokens, **options)

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]], bos: bool = True) -> Any:
        """How likely texts are: a `Score` for each (its `logprob`, `perplexity`, `logprobs` of the tokens).

        One text gives one. With `bos` token 0 stands before each text, so that its first token has a probability, too.
        """
        from rookery.engine.score import score

        return score(self, [texts], bos)[0] if isinstance(texts, str) else score(self, texts, bos)

    def embed(self, texts: str | Sequence[str] | Sequence[Sequence[int]], bos: bool = True) -> np.ndarray:
        """A vector of length 1 for each text, float32 [texts, hidden_size] ([hidden_size] for one), from its state."""
        from rookery.engine.score import embed

        return embed(self, [texts], bos)[0] if isinstance(texts, str) else embed(self, texts, bos)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [t, vocab]: what follows each of t tokens, from the beginning of a text."""
        tokens, state = self.tokens_of(list(token_ids)), self.fresh_state()
        logits = np.empty((len(tokens), self.runner.config.vocab_size), np.float32)
        for start in range(0, len(tokens), CHUNK):
            logits[start : start + CHUNK] = self.runner.forward(tokens[start : start + CHUNK], state, "all")
        return logits

    def tokens_of(self, text_or_ids: str | Sequence[int]) -> list[int]:
        """Token ids of a text; ids are checked and come back as they are."""
        vocab_size = self.runner.config.vocab_size
        if isinstance(text_or_ids, str):
            from rookery.tokenizers.pairing import prompt_ids

            ids, source = prompt_ids(self.tokenizer, text_or_ids), "the tokenizer gives"
        else:
            ids, source = [operator.index(token) for token in text_or_ids], "got"
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{source} token {token}, the model knows 0 to {vocab_size - 1}")
        return ids


def _of_each(given: Any, prompts: Sequence, what: str, kind: type) -> list[Any]:
    """One for each prompt, of what was given once or as a list."""
    found = [given] * len(prompts) if given is None or isinstance(given, kind) else list(given)
    if len(found) != len(prompts):
        raise ValueError(f"there are {len(found)} {what} for {len(prompts)} prompts; give one, or one for each")
    return found


def _is_list(prompt: Any) -> bool:
    """True for several prompts: a list of texts, or of lists of token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and not hasattr(prompt[0], "__index__")


def model_path(path: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """`path`, or where the embedded model is; BadCheckpoint where there is none."""
    if path is not None:
        return path
    if not EMBEDDED.is_dir():
        raise BadCheckpoint(
            "this installation of rookery has no embedded model; give the path of a model file (--model PATH)"
        )
    return EMBEDDED


def _start(checkpoint: Checkpoint, runner: Runner) -> Mapping[str, np.ndarray] | None:
    """Arrays of the tuned state in the model's file, None where it has none."""
    if not checkpoint.kept:
        return None
    from rookery.checkpoints.tuned_state import tuned_state_of

    tuned = tuned_state_of(checkpoint)
    if tuned is None:
        return None
    log.info("%s carries a tuned state; texts start from it", checkpoint.path)
    return onto_fresh(tuned, runner)


def onto_fresh(tuned: TunedState, runner: Runner) -> Mapping[str, np.ndarray]:
    """Arrays of the runner's fresh state with those of a tuned one in their place."""
    fresh = runner.init_state().tensors()
    return tuned.onto(fresh, family=runner.family, config=runner.config, model=runner.fingerprint())


def _runner(
    checkpoint: Checkpoint,
    threads: int | None,
    isa: str | None,
    device: str | None,
    quantize: str | None,
    lean: bool = False,
    preload: bool = False,
) -> Runner:
    """The model on `device`, or on the compiled runtime where that can run it, or with torch on the CPU."""
    if checkpoint.family.kind != "language":
        raise BadCheckpoint(
            f"{checkpoint.path!r} is a model of kind {checkpoint.family.kind!r}; LLM runs language models"
        )
    if device is not None:
        if lean:
            raise ValueError(f"lean is for the compiled runtime, device={device!r} for torch; give one of the two")
        if isa is not None:
            raise ValueError(
                f"isa={isa!r} is for the compiled runtime, device={device!r} for torch; give one of the two"
            )
        if quantize is not None:
            raise ValueError(
                f"quantize={quantize!r} is for the compiled runtime, device={device!r} for torch; give one of the two"
            )
        return _torch_runner(checkpoint, threads, device, f"device={device!r} was given")
    from rookery.engine.runners.native import NativeRunner

    try:
        return NativeRunner(checkpoint, threads=threads, isa=isa, quantize=quantize, lean=lean, preload=preload)
    except BackendUnavailable as reason:
        if isa is not None or quantize is not None or lean:
            raise
        log.info("%s; torch runs it", reason)
        return _torch_runner(checkpoint, threads, "cpu", str(reason))


def _torch_runner(checkpoint: Checkpoint, threads: int | None, device: str, reason: str) -> Runner:
    try:
        from rookery.engine.runners.torch import TorchRunner
    except ImportError as error:
        raise MissingDependency(
            f'{reason}; torch could run the model, but {error}; pip install "rookery[torch]"'
        ) from None
    return TorchRunner.load(checkpoint, device=device, threads=threads)
