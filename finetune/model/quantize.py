"""Quantized base weights through bitsandbytes: what is quantized, to which values, and how a weight is replaced.

One contract holds the numbers together: **a quantized base is loaded with `dtype=compute_dtype`**. transformers casts a weight to the
dtype of loading before it quantizes, bitsandbytes dequantizes to the dtype of its input, and PEFT's DoRA to the dtype that was quantized.
With one dtype all three agree, and `roundtrip` gives exactly the values that the model computes with.

Sources: NF4, FP4 and double quantization are QLoRA (2305.14314, section 3); int8 is LLM.int8 (2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.config.schema import EightBit, FourBit, NoQuantization, Quantization
from finetune.errors import ConfigError, VerificationError


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as a quantized module holds it."""

    parameter: nn.Parameter
    """`Params4bit` or `Int8Params`, frozen."""
    values: Tensor
    """(d_out, d_in) fp32: what the parameter stands for, rounded to the compute dtype as the module's matrix product does."""


def bnb_config(quantization: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The `quantization_config` for `from_pretrained`; load with `dtype=compute_dtype` too. None: not quantized."""
    match quantization:
        case NoQuantization():
            return None
        case FourBit():
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.method,
                bnb_4bit_use_double_quant=quantization.double_quant,
                bnb_4bit_compute_dtype=compute_dtype,
            )
        case EightBit():
            return BitsAndBytesConfig(load_in_8bit=True)
    assert_never(quantization)


def disable_cpu_repacking(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights in place; call it right after loading, before any forward. Returns how many.

    On CPUs with avx512_bf16 the first no-grad forward in eval mode rewrites every 4-bit weight in a layout that only inference reads:
    from then on gradients, dequantization and merging are wrong while the loss looks normal. Without effect on a GPU.
    """
    modules = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for module in modules:
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise VerificationError(
                "the 4-bit weights were already repacked for CPU inference, which loses precision",
                where="a model that ran a forward pass before its weights were protected",
                fix="call disable_cpu_repacking on the model right after loading it",
            )
        module.support_avx512bf16_for_cpu = False
    return len(modules)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let ``model``, which was stored quantized, compute in ``dtype`` as if it had been loaded with it: transformers leaves it, its
    unquantized weights too, in the type it was saved in."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (is_quantized(module) and name == "weight"):
                parameter.data = parameter.data.to(dtype)


def keep_int8_scales(model: nn.Module) -> int:
    """Let 8-bit linears of ``model`` survive that PEFT reads their weights between two forwards, as DoRA does. Returns how many.

    bitsandbytes moves the scales from the parameter to the module's state in the first forward. PEFT, having read a weight on a CPU, puts a
    new parameter without scales into the module, and the next forward would overwrite the state's with nothing. Without effect on a GPU.
    """
    modules = [module for module in model.modules() if is_int8(module)]
    for module in modules:
        module.register_forward_pre_hook(_return_scales)
    return len(modules)


def _return_scales(module: nn.Module, _inputs: object) -> None:
    linear = _quantized_linear(module)
    if linear.weight.CB is not None and linear.weight.SCB is None:
        linear.weight.SCB = linear.state.SCB


def quantize_weight(
    weight: Tensor, quantization: FourBit | EightBit, compute_dtype: torch.dtype, device: torch.device | str | None = None
) -> QuantizedWeight:
    """Quantize ``weight`` (d_out, d_in, any float type) as loading a model does, on ``device`` (default: the weight's)."""
    target = torch.device(device) if device is not None else weight.device
    source = weight.detach().to(target, compute_dtype)
    if source.ndim != 2:
        raise VerificationError(f"a quantized weight has two dimensions, not {tuple(source.shape)}", fix="quantize linear layers only")
    match quantization:
        case FourBit():
            parameter = bnb.nn.Params4bit(
                source, requires_grad=False, compress_statistics=quantization.double_quant, quant_type=quantization.method
            ).to(target)
            values = dequantize_4bit(parameter.data, parameter.quant_state)
        case EightBit():
            # from the CPU, because bitsandbytes quantizes a parameter only when it leaves the CPU (or stays there)
            parameter = bnb.nn.Int8Params(source.to("cpu"), requires_grad=False, has_fp16_weights=False).to(target)
            values = int8_vectorwise_dequant(parameter.data, parameter.SCB).to(compute_dtype)
        case _:
            assert_never(quantization)
    return QuantizedWeight(cast(nn.Parameter, parameter), values.float())


def roundtrip(weight: Tensor, quantization: Quantization, compute_dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """The values a module holding ``weight`` (d_out, d_in) computes with, (d_out, d_in) fp32 on the device of the computation.

    Without quantization: the weight rounded to ``compute_dtype``, since that is how the base was loaded.
    """
    if isinstance(quantization, NoQuantization):
        return weight.detach().to(device or weight.device, compute_dtype).float()
    return quantize_weight(weight, quantization, compute_dtype, device).values


def quantized_modules(config: PretrainedConfig) -> frozenset[str]:
    """Names of the modules that transformers quantizes when it loads a causal model of ``config``: every linear but the output head.

    Built on the meta device, without weights, and asked of transformers' own rule, so that training and merging cannot disagree.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    }
    transposed = [name for name, module in linear.items() if isinstance(module, Conv1D)]
    if transposed:
        raise ConfigError(
            f"quantization of {type(model).__name__} is not supported: its linear layers store transposed weights",
            where=f"model.id: {transposed[0]} and {len(transposed) - 1} more modules",
            fix="use quantization: {method: none} with this model",
        )
    return frozenset(linear)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a 4-bit or 8-bit linear of bitsandbytes."""
    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def is_int8(module: nn.Module) -> bool:
    """Whether ``module`` is an 8-bit linear of bitsandbytes."""
    return isinstance(module, bnb.nn.Linear8bitLt)


def dequantized(module: nn.Module) -> Tensor:
    """The values of a live quantized ``module``, (d_out, d_in) fp32; leaves the module as it is.

    For 8-bit modules these are the values before rounding to the compute dtype, which such a module does not know.
    """
    linear = _quantized_linear(module)
    if isinstance(linear, bnb.nn.Linear4bit):
        if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
            raise VerificationError(
                "the 4-bit weights were repacked for CPU inference and cannot be read back",
                fix="call disable_cpu_repacking on the model right after loading it",
            )
        return cast(Tensor, dequantize_4bit(linear.weight.data, linear.weight.quant_state)).float()
    # bitsandbytes moves the scales from the parameter to the module's state in the first forward
    scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return cast(Tensor, int8_vectorwise_dequant(linear.weight.data, scales)).float()


def replace_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Let a quantized ``module`` hold ``quantized`` in place of its own weight; shapes must agree (VerificationError)."""
    linear = _quantized_linear(module)
    expected, given = (linear.out_features, linear.in_features), tuple(quantized.values.shape)
    if expected != given:
        raise VerificationError(f"a weight of shape {given} cannot replace one of shape {expected}", where=type(module).__name__)
    parameter: Any = quantized.parameter
    if isinstance(linear, bnb.nn.Linear4bit):
        parameter.module = linear
        linear.quant_state = parameter.quant_state
    else:
        # the state caches the weight that is replaced
        linear.state.reset_grads()
    linear.weight = parameter


def _quantized_linear(module: nn.Module) -> Any:
    """``module``, which must be one of bitsandbytes' (whose attributes have no types)."""
    if not is_quantized(module):
        raise VerificationError(f"{type(module).__name__} is not a quantized linear layer", fix="load the base with its quantization")
    return module
