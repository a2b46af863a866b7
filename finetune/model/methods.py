"""PEFT's configuration of every method that PEFT has: the one place where a member of the `tuning` union becomes a library's object."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
from peft import IA3Config, LNTuningConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

from finetune.config.schema import AdaLora, Ia3, Lora, Norm, Prefix, Prompt, SpectrumTargets, TiedLora, Vera
from finetune.errors import ConfigError
from finetune.model.adalora import adalora_config
from finetune.model.load import load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.targets import find_targets, linear_modules
from finetune.model.tied import as_lora
from finetune.planning.targets import scaled_by_ia3

Peft = Lora | TiedLora | AdaLora | Vera | Ia3 | Prompt | Prefix | Norm
"""The methods that PEFT's modules carry, and whose adapters PEFT loads."""

_TASK = "CAUSAL_LM"


@dataclass(frozen=True, slots=True)
class Given:
    """What a method may need besides the model and its section of the configuration."""

    seed: int = 0
    """Of the run; VeRA draws its projections from it."""
    dtype: torch.dtype = torch.float32
    """Of every trainable parameter. fp32, unless bf16 was asked for (it loses small updates, pitfall A12)."""
    ratios: Mapping[str, float] | None = None
    """Signal-to-noise by module name, from `spectrum.ratios_for`, for targets that Spectrum chooses."""
    new_ids: Sequence[int] = ()
    """Ids of the tokens that were added."""


def peft_config(model: Any, tuning: Peft, given: Given) -> PeftConfig:
    """PEFT's configuration for ``tuning`` on ``model``; ConfigError where nothing of the model fits the method."""
    match tuning:
        case Lora():
            return lora_config(model, _named(model, tuning, given), given.new_ids)
        case TiedLora():
            return lora_config(model, _named(model, as_lora(tuning), given))
        case AdaLora():
            return adalora_config(tuning, find_targets(model, tuning, given.ratios))
        case Vera():
            return _vera(tuning, find_targets(model, tuning, given.ratios), given.seed)
        case Ia3():
            return _ia3(model)
        case Prompt() | Prefix():
            return _virtual(model, tuning)
        case Norm():
            return LNTuningConfig(task_type=_TASK, target_modules=norm_modules(model))
    assert_never(tuning)


def _named(model: Any, tuning: Lora, given: Given) -> Lora:
    """``tuning`` with the names of the modules that Spectrum chose, where it chose them."""
    if not isinstance(tuning.targets, SpectrumTargets):
        return tuning
    return tuning.model_copy(update={"targets": tuple(find_targets(model, tuning, given.ratios))})


def _vera(tuning: Vera, targets: list[str], seed: int) -> VeraConfig:
    """The random matrices are stored with the adapter: another version of torch may draw others from the same seed."""
    return VeraConfig(
        task_type=_TASK,
        r=tuning.rank,
        target_modules=targets,
        projection_prng_key=seed,
        save_projection=True,
        vera_dropout=tuning.dropout,
        d_initial=tuning.d_initial,
    )


def _virtual(model: Any, tuning: Prompt | Prefix) -> PeftConfig:
    """Prompts start as the embeddings of random tokens; `begin` sets every other start."""
    if isinstance(tuning, Prompt):
        return PromptTuningConfig(task_type=_TASK, num_virtual_tokens=tuning.tokens, prompt_tuning_init="SAMPLE_VOCAB")
    # asked of the model: what its configuration says of heads means something else in some architectures
    kept = _keys_and_values(model, torch.zeros((1, 1), dtype=torch.int64))
    heads, _, size = kept[0].shape
    if any(part.shape != kept[0].shape for part in kept):
        what = "prefix tuning gives every layer keys and values of one shape, and the layers of this model differ"
        raise ConfigError(what, where="tuning.method", fix="use `method: prompt`")
    layers, width = len(kept) // 2, heads * size
    return PrefixTuningConfig(
        task_type=_TASK, num_virtual_tokens=tuning.tokens, num_layers=layers, num_attention_heads=heads, token_dim=width
    )


@torch.no_grad()
def _keys_and_values(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer keeps of ``ids`` (1, tokens), keys and values in turn: each (heads, tokens, head size)."""
    cache = model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=True).past_key_values
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "keys") for layer in layers):
        what = "prefix tuning gives every layer keys and values, and this model has layers without"
        raise ConfigError(what, where="tuning.method", fix="use `method: prompt`")
    return [part[0] for layer in layers for part in (layer.keys, layer.values)]


def _ia3(model: Any) -> IA3Config:
    attention, inner = scaled_by_ia3(linear_modules(model))
    return IA3Config(task_type=_TASK, target_modules=[*attention, *inner], feedforward_modules=inner)


def norm_modules(model: Any) -> list[str]:
    """Full names of the normalization layers that have a scale; ConfigError where there is none."""
    found = [
        name
        for name, module in model.named_modules()
        if re.search("norm", type(module).__name__, re.IGNORECASE) and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    ]
    if not found:
        raise ConfigError("no normalization layer of this model has a scale", where="tuning.method", fix="use `method: lora`")
    return found


def norm_parameters(model: Any) -> int:
    """Scalars that `method: norm` would train."""
    return sum(int(model.get_submodule(name).weight.numel()) for name in norm_modules(model))


@torch.no_grad()
def begin(model: Any, tuning: Peft) -> None:
    """Set what PEFT's own initialization does not: the start of virtual tokens, and which part of a norm trains. ``model``: PEFT's."""
    match tuning:
        case Prompt(text=str() as text):
            _start_from_text(model, text)
        case Prefix():
            _start_from_activations(model)
        case AdaLora():
            # a part of the scale, which no file holds; PEFT makes it trainable when it raises a bf16 one to fp32
            _freeze(model, re.compile(r"\.ranknum\."))
        case Norm():
            _freeze(model, re.compile(r"\.ln_tuning_layers\..*\.(?!weight$)[^.]*$"))  # shifts stay: scales alone train
        case _:
            pass


def _freeze(model: Any, pattern: re.Pattern[str]) -> None:
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.requires_grad_(False)


def _start_from_text(model: Any, text: str) -> None:
    """Virtual tokens start as the embeddings of ``text``, repeated or cut to their number."""
    base = model.get_base_model()
    ids = load_tokenizer(Path(base.config._name_or_path))(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"the text {text!r} has no token", where="tuning.text", fix="write a sentence, or leave it out")
    weight = model.prompt_encoder["default"].embedding.weight
    rows = torch.tensor(ids, device=weight.device).repeat(-(-len(weight) // len(ids)))[: len(weight)]
    weight.copy_(base.get_input_embeddings()(rows))


def _start_from_activations(model: Any) -> None:
    """Prefixes start as the keys and values of random tokens: arbitrary ones leave a model that answers nothing (2101.00190, 4.3)."""
    base = model.get_base_model()
    weight = model.prompt_encoder["default"].embedding.weight
    # as many random tokens, drawn on the CPU so that every device draws the same
    ids = torch.randint(base.get_input_embeddings().weight.shape[0], (1, len(weight)))
    weight.copy_(torch.stack(_keys_and_values(base, ids)).permute(2, 0, 1, 3).reshape(len(weight), -1))
