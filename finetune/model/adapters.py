"""Everything that makes a base model trainable: attaching, switching, saving, and loading without a tensor left over.

The methods of the `tuning` union are told apart here and in `finetune.model.methods`, by the type of their section, and nowhere else.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from safetensors.torch import load_file

from finetune.config.schema import Bitfit, Full, Houlsby, SpectrumTargets, TiedLora, Tuning
from finetune.errors import VerificationError
from finetune.model import parts
from finetune.model.adalora import whole_ranks
from finetune.model.bias import add_biases
from finetune.model.bottleneck import add_bottlenecks
from finetune.model.head import accept_wide_inputs
from finetune.model.methods import Given, Peft, begin, peft_config
from finetune.model.parts import Own
from finetune.model.quantize import keep_int8_scales
from finetune.model.targets import linear_modules, refuse_fused_experts
from finetune.model.tied import tie
from finetune.planning.targets import chosen

WEIGHTS = parts.WEIGHTS


def attach(model: Any, tuning: Tuning, given: Given | None = None) -> Any:
    """Make ``model``, a loaded and frozen base, trainable as ``tuning`` says; returns it, or what PEFT puts around it.

    Raises ConfigError where the model has nothing that the method could train.
    """
    given = given or Given()
    match tuning:
        case Full():
            trained = _unfrozen(model, tuning, given)
        case Bitfit() | Houlsby():
            trained = _with_parts(model, tuning)
        case _:
            trained = _with_peft(model, tuning, given)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(given.dtype)
    if isinstance(trained, PeftModel):
        _settle(trained)
    return trained


def _unfrozen(model: Any, tuning: Full, given: Given) -> Any:
    """Everything trains, or the linear weights that Spectrum chose (without their biases)."""
    if not isinstance(tuning.targets, SpectrumTargets):
        model.requires_grad_(True)
        return model
    if given.ratios is None:
        raise ValueError("targets by Spectrum need the ratios of the base: pass spectrum.ratios_for(tuning, base_dir)")
    refuse_fused_experts(model, "spectrum", "use `targets: all`, or `method: lora` with `targets: attention`")
    model.requires_grad_(False)
    for name in chosen({name: given.ratios[name] for name in linear_modules(model)}, tuning.targets.spectrum):
        model.get_submodule(name).weight.requires_grad_(True)
    return model


def _with_parts(model: Any, tuning: Own) -> Any:
    match tuning:
        case Bitfit():
            add_biases(model)
        case Houlsby():
            add_bottlenecks(model, tuning)
    model.own_tuning, model.own_base = tuning, str(model.config._name_or_path)
    return model


def _with_peft(model: Any, tuning: Peft, given: Given) -> Any:
    config = peft_config(model, tuning, given)
    with _quiet():
        trained = get_peft_model(model, config)
    begin(trained, tuning)
    if isinstance(tuning, TiedLora):
        tie(trained, tuning)
    return trained


def _settle(model: Any) -> None:
    """Let the parts of ``model`` (PEFT's) work together where their types differ, without autocast too."""
    base = model.get_base_model()
    for projection in (getattr(model.base_model, "vera_A", None), getattr(model.base_model, "vera_B", None)):
        if projection is not None:  # VeRA multiplies them by the input in the type of its vectors
            vector = next(parameter for name, parameter in model.named_parameters() if ".vera_lambda_" in name)
            projection["default"] = projection["default"].to(vector.dtype)
    accept_wide_inputs(base.get_output_embeddings())
    keep_int8_scales(base)
    for module in base.modules():
        if isinstance(module, LNTuningLayer | IA3Layer):
            module.register_forward_hook(_as_input)


def _as_input(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """An fp32 scale makes fp32 states, which the next layer of a bf16 base can multiply under autocast alone."""
    return output if torch.is_autocast_enabled(output.device.type) else output.to(inputs[0].dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's advice on what does not apply here: our merge unties tied embeddings itself, and AdaLoRA's rank is stated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
        yield


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name; one that several modules share appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> int:
    """All scalars of the model; a 4-bit weight counts what it stands for, not its packed bytes."""
    return sum(_logical_size(parameter) for parameter in model.parameters())


def _logical_size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def save(model: Any, directory: Path) -> None:
    """Write the adapter (or, for full tuning, the model), then read it back (pitfall B9).

    PEFT's methods are written in PEFT's format, without copies of embeddings that only carry a LoRA; the others as `parts` describes.
    """
    if isinstance(model, PeftModel):
        with whole_ranks(model):
            model.save_pretrained(directory, save_embedding_layers=False, safe_serialization=True)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's template; ours is written with the run's figures
    elif is_adapter(model):
        parts.save_parts(model, directory)
    else:
        model.save_pretrained(directory)
        return
    _require_equal(model, directory)


@dataclass(frozen=True, slots=True)
class Contents:
    """What the file of an adapter holds."""

    tensors: Mapping[str, torch.Tensor]
    """The live tensors by their key in the file; for full tuning, what trains, by the model's own names."""
    file: str
    """Its name."""
    write_config: Callable[[Path], None]
    """Writes the adapter's configuration, as it is now, into a directory; later changes of the model are not seen."""


def contents(model: Any) -> Contents:
    """The parts that `save` writes, for a writer that must not touch the model."""
    if isinstance(model, PeftModel):
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        return Contents(_state(model), WEIGHTS, config.save_pretrained)
    if is_adapter(model):
        settings = parts.config_fields(model)
        return Contents(_state(model), WEIGHTS, lambda directory: parts.write_config(settings, directory))
    return Contents(trainable(model), "model.safetensors", lambda _: None)


def load(base: Any, directory: Path, *, is_trainable: bool = False) -> Any:
    """``base`` with the adapter of ``directory``: every tensor of the file is used and none is missing (pitfall A4)."""
    own = parts.read_config(directory)
    if own is not None:
        model = attach(base, own)
        parts.read_parts(model, directory)
        return model if is_trainable else model.requires_grad_(False)
    try:
        with _quiet():
            model = PeftModel.from_pretrained(base, directory, is_trainable=is_trainable, local_files_only=True)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise VerificationError(
            f"cannot load the adapter: {error}", where=str(directory), fix="name the adapter of the same base model"
        ) from error
    if not is_trainable:
        model.requires_grad_(False)
    _restore_precision(model, load_file(directory / WEIGHTS))
    _settle(model)
    _require_equal(model, directory)
    return model


def read_into(model: Any, directory: Path) -> None:
    """Put the adapter of a checkpoint into ``model``, which was attached in the same way; VerificationError where it does not fit."""
    if not isinstance(model, PeftModel):
        parts.read_parts(model, directory)
        return
    stored = load_file(directory / WEIGHTS)
    with whole_ranks(model):
        try:
            result = set_peft_model_state_dict(model, stored)
        except (KeyError, RuntimeError) as error:
            raise VerificationError(
                f"the checkpoint does not fit the model: {error}", where=str(directory), fix="resume with the same configuration"
            ) from error
    # PEFT hands prompts to their encoder itself, and still lists them as unexpected
    unexpected = [name for name in result.unexpected_keys if name != "prompt_embeddings"]
    if unexpected:
        raise VerificationError(
            f"the checkpoint does not fit the model: {unexpected[0]}", where=str(directory), fix="resume with the same configuration"
        )
    _require_equal(model, directory)


def _restore_precision(model: Any, stored: dict[str, torch.Tensor]) -> None:
    """Take the tensors of the file as they are: PEFT makes copies of modules in the base's type, and rounds what it loads to it."""
    for name, parameter in model.named_parameters():
        value = stored.get(name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default"))
        if value is not None and value.dtype != parameter.dtype:
            parameter.data = value.to(parameter.device)


def _require_equal(model: Any, directory: Path) -> None:
    live = _state(model)
    stored = load_file(directory / WEIGHTS)
    for name in sorted(set(live) | set(stored)):
        if name not in stored or name not in live:
            raise VerificationError(
                f"the adapter tensor {name} is {'not used by the model' if name in stored else 'missing'}", where=str(directory / WEIGHTS)
            )
        # the wider of the two types holds both values exactly: a rounded copy is not equal
        wide = torch.promote_types(live[name].dtype, stored[name].dtype)
        if not torch.equal(live[name].detach().cpu().to(wide), stored[name].to(wide)):
            raise VerificationError(
                f"the adapter tensor {name} differs from the file", where=str(directory / WEIGHTS), fix="save or copy it again"
            )
    if not stored:
        raise VerificationError("the adapter file is empty", where=str(directory / WEIGHTS), fix="train again")


def _state(model: Any) -> Mapping[str, torch.Tensor]:
    """The adapter's live tensors by their key in the file."""
    if not isinstance(model, PeftModel):
        return parts.tensors(model)
    with whole_ranks(model):
        state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def name_base(model: Any, name: str) -> None:
    """Let the files of ``model``'s adapter say that its base is ``name``."""
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = name
    elif is_adapter(model):
        model.own_base = name


def is_adapter(model: torch.nn.Module) -> bool:
    """Whether ``model`` carries an adapter that can be switched off; after full tuning it does not."""
    return isinstance(model, PeftModel) or bool(parts.parts(model))


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Inside the block ``model`` computes what its base does, whatever its adapter is."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else parts.switched_off(model):
            yield
    finally:
        for parameter, flag in trained:  # PEFT's switches set it as a side effect
            parameter.requires_grad_(flag)
