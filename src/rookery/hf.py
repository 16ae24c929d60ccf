"""Models in transformers: after `register()`, `AutoModelForCausalLM.from_pretrained` opens what this library opens.

    import rookery.hf
    rookery.hf.register()
    model = AutoModelForCausalLM.from_pretrained("folder")   # official, Hugging Face or fla names

Known are folders with the model types "rookery" (ours, any family) and "rwkv5", "rwkv6", "rwkv7" (models of the Hub and
of flash-linear-attention); RWKV-4 has a model of its own in transformers. `generate()` works as for any causal model:
batches padded on the left, beams, with and without cache.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.errors import MissingDependency
from rookery.models import build, load, save_model
from rookery.nn.language_model import LanguageModel
from rookery.registry import families
from rookery.state import State

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PretrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise MissingDependency(f'rookery.hf needs transformers ({error}); pip install "rookery[train]"') from None

OTHERS = ("rwkv5", "rwkv6", "rwkv7")
"""Model types of folders that other programs write."""


class RookeryConfig(PretrainedConfig):
    """What config.json says; for our own folders `family` and `settings`, the fields of the family's config."""

    model_type = "rookery"

    def __init__(self, family: str = "", settings: dict[str, Any] | None = None, **others: Any) -> None:
        self.family, self.settings = family, settings or {}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if name in self.settings:
                others.setdefault(name, self.settings[name])
        super().__init__(**{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **others})

    @classmethod
    def of(cls, model: LanguageModel) -> RookeryConfig:
        """The config of a model that is loaded."""
        return RookeryConfig(model.family, asdict(model.config), dtype=str(next(model.parameters()).dtype)[6:])


class StateCache(Cache):
    """transformers' cache around a `State`: the same tensors whatever the text's length."""

    def __init__(self, state: State | None = None, columns: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = columns
        """Tokens and padding read so far, which is what `generate` counts."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.state = self.state.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.tokens_seen.device)
            self.state = self.state.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent state cannot forget its last tokens; keep a copy of the cache from before them")


class RookeryForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of this library as transformers' code expects one; `self.model` is the model itself."""

    config_class = RookeryConfig
    base_model_prefix = "model"
    _is_stateful = True
    _supports_flash_attn = False

    def __init__(self, config: RookeryConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        if model is None:
            if not config.family:
                raise ValueError(
                    f"a new model cannot be made from a config of type {config.model_type!r}: make it with "
                    "rookery.create_model and wrap it, RookeryForCausalLM.of(model)"
                )
            family = families()[config.family]
            model = build(family, family.config(**config.settings))
            model.init_weights()
        self.model = model
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel) -> RookeryForCausalLM:
        """A loaded or newly made model, wrapped."""
        return RookeryForCausalLM(RookeryConfig.of(model), model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        output_loading_info: bool = False,
        **others: Any,
    ) -> Any:
        """The model in a folder, file or Hub id of any readable format; the file's precision unless `dtype` is given.

        `device_map` is a device, or "auto" for a GPU where there is one. Settings that concern attention or remote code
        are taken and not used.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if revision not in (None, "main") and not os.path.exists(path):
            path += f"@{revision}"
        dtype = dtype if dtype is not None else others.get("torch_dtype")
        dtype = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = load(path, device=_device(device_map), dtype=dtype)
        config = config if config is not None else RookeryConfig.of(model)
        wrapped = cls(config, model).eval()
        if (Path(path) / "generation_config.json").is_file():
            wrapped.generation_config = GenerationConfig.from_pretrained(path)
        nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (wrapped, nothing) if output_loading_info else wrapped

    def save_pretrained(self, save_directory: str | os.PathLike[str], **others: Any) -> None:
        """Writes a folder of official names with config.json, which `rookery` verbs and `from_pretrained` read."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / "model.safetensors")
        RookeryConfig.of(self.model).save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        settings["architectures"] = ["RookeryForCausalLM"]
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self.generation_config.save_pretrained(folder)

    def get_input_embeddings(self) -> nn.Module:
        name = families()[self.model.family].fingerprinted[0]
        return self.model.get_submodule(name.removesuffix(".weight"))

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, t, vocab] of `input_ids` [b, t]; `attention_mask` [b, past + t] is 0 at padding, on either side.

        With `use_cache` (the default outside training) `past_key_values` is a StateCache, which is advanced in place.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model reads token ids; give input_ids and no inputs_embeds")
        cache = _cache(past_key_values, use_cache if use_cache is not None else not self.training)
        mask = _padding(attention_mask, input_ids)
        logits, state = self.model(input_ids, cache.state if cache is not None else None, mask=mask)
        if cache is not None:
            cache.state, cache.columns = state, cache.columns + input_ids.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = logits if isinstance(kept, int) else logits[:, kept]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **others)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` must make no cache of keys and values: ours comes with the first output

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file or from the family's own `init_weights`."""


def register() -> None:
    """Tells transformers' Auto classes of our model types and their tokenizer; may be called again."""
    from rookery.hf_tokenizer import RookeryTokenizer

    AutoTokenizer.register(RookeryConfig, slow_tokenizer_class=RookeryTokenizer, exist_ok=True)
    AutoConfig.register(RookeryConfig.model_type, RookeryConfig, exist_ok=True)
    AutoModelForCausalLM.register(RookeryConfig, RookeryForCausalLM, exist_ok=True)
    for kind in OTHERS:
        config = type(f"Rookery{kind.title()}Config", (RookeryConfig,), {"model_type": kind})
        model = type(f"Rookery{kind.title()}ForCausalLM", (RookeryForCausalLM,), {"config_class": config})
        AutoConfig.register(kind, config, exist_ok=True)
        AutoTokenizer.register(config, slow_tokenizer_class=RookeryTokenizer, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def _cache(given: Cache | None, wanted: bool) -> StateCache | None:
    if isinstance(given, StateCache):
        return given
    if given is not None and given.get_seq_length():
        raise ValueError(f"past_key_values is a {type(given).__name__} of another model; this one fills a StateCache")
    return StateCache() if wanted or given is not None else None


def _padding(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The mask of these tokens, None where all are real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got shape {list(attention_mask.shape)}")
    mask = attention_mask[:, -input_ids.shape[1] :].bool()
    return None if bool(mask.all()) else mask


def _device(device_map: Any) -> torch.device | str | None:
    if isinstance(device_map, dict):
        device_map = device_map.get("", next(iter(device_map.values()), None))
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{device_map}" if isinstance(device_map, int) else device_map
