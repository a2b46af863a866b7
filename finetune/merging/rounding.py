"""Rounding of merged weights to the type they are written in: to the nearest value, or to one of both neighbours by chance.

A short run's updates are smaller than half a step of bf16, and the nearest value is then the base's own: the update is lost. Stochastic
rounding goes up with the probability of the part that is cut off, so that the mean of what is written is the exact value and the sum over
many inputs keeps the update. The price is noise of a step's size in each weight. Chance is a hash of (seed, name of the tensor, place in
it), the same on every device and for every part of a tensor, so that a merge can be repeated and checked row by row.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import VerificationError

Rounding = Literal["nearest", "stochastic"]

_AT_ONCE = 1 << 22
"""Elements that are worked on at a time: what a conversion may add to a tensor's own memory."""
_CUT_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of fp32's mantissa that the type has no room for."""
_SMALLEST_NORMAL_FP16, _STEP_BELOW = 2.0**-14, 2.0**-24


class DoesNotFitError(VerificationError):
    """A merged value is beyond the range of the type it was to be written in; a wider type may do."""


def rounded(tensor: Tensor, dtype: torch.dtype, name: str, rounding: Rounding = "nearest", seed: int = 0) -> Tensor:
    """``tensor`` (any shape) in ``dtype``, which is ``name`` in the output. Tensors that are not of floating point stay as they are.

    Raises VerificationError for NaN or infinity, DoesNotFitError where a finite value becomes infinite.
    """
    if not tensor.is_floating_point():
        return tensor.to(dtype)
    flat = tensor.contiguous().view(-1)
    result = flat if flat.dtype == dtype else torch.empty_like(flat, dtype=dtype)
    for start in range(0, flat.numel(), _AT_ONCE):
        part, place = flat[start : start + _AT_ONCE], result[start : start + _AT_ONCE]
        if result is flat:
            _require_finite(part, part, name)
        else:
            round_into(place, part, start, name, rounding, seed)
    return result.view(tensor.shape)


def round_into(place: Tensor, values: Tensor, start: int, name: str, rounding: Rounding = "nearest", seed: int = 0) -> None:
    """Write ``values`` (n,), which begin at element ``start`` of the tensor ``name``, into ``place`` (n,) of its type; see `rounded`."""
    place.copy_(_part(values, place.dtype, rounding, _key(seed, name), start))
    _require_finite(values, place, name)


def rounded_rows(rows: Tensor, places: Tensor, dtype: torch.dtype, name: str, rounding: Rounding = "nearest", seed: int = 0) -> Tensor:
    """What `rounded` makes of the ``rows`` (n, d) of a tensor that stand at the ``places`` (n,) of it."""
    if rounding == "nearest" or dtype not in _CUT_BITS:
        return rows.to(dtype)
    width, key = rows[0].numel(), _key(seed, name)
    parts = [_part(row.reshape(-1), dtype, rounding, key, place * width) for row, place in zip(rows, places.tolist(), strict=True)]
    return torch.stack(parts).view(rows.shape).to(dtype)


def _key(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())


def _part(values: Tensor, dtype: torch.dtype, rounding: Rounding, key: int, start: int) -> Tensor:
    """``values`` (n,), which begin at element ``start`` of their tensor, such that ``dtype`` holds them or takes the nearest."""
    if rounding == "nearest" or dtype not in _CUT_BITS:
        return values  # written to another type, a value goes to the nearest
    return _stochastic(values.float(), dtype, _noise(key, start, len(values), values.device))


def _stochastic(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """``values`` (n,) fp32 rounded up in magnitude with the probability of the part that is cut off; ``noise`` (n,) int32 is used up."""
    if not _is_finite(values):
        return values  # which is refused once it is written; adding to the bits of a NaN could make a number of it
    cut = (1 << _CUT_BITS[dtype]) - 1
    noise &= cut
    chance = noise.float() / (cut + 1) if dtype == torch.float16 else None
    # the bits of a float grow with its magnitude, and a carry out of the mantissa moves to the next power of two
    noise += values.view(torch.int32)
    noise &= ~cut
    found = noise.view(torch.float32)
    if chance is None:
        return found
    small = torch.floor(values.abs() / _STEP_BELOW + chance).mul_(_STEP_BELOW).copysign_(values)
    return torch.where(values.abs() < _SMALLEST_NORMAL_FP16, small, found)


def _noise(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32, uniform over all bits: the finalizer of MurmurHash3 (public domain) over key and place, in wrapping arithmetic."""
    found = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    found ^= _signed(key)
    for factor, shift in ((_signed(0x85EBCA6B), 16), (_signed(0xC2B2AE35), 13), (1, 16)):
        # the shift of a signed number drags its sign along
        found ^= (found >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        found *= factor
    return found


def _signed(bits: int) -> int:
    """The int32 with these 32 ``bits``."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def _is_finite(values: Tensor) -> bool:
    if not values.numel():
        return True
    low, high = values.aminmax()  # NaN is the least and the greatest of whatever holds one
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _require_finite(exact: Tensor, cast: Tensor, name: str) -> None:
    if _is_finite(cast):
        return
    if not _is_finite(exact):
        raise VerificationError(f"{name} holds NaN or infinity", where="the merged weights", fix="check the base model's files")
    raise DoesNotFitError(f"{name} has values that do not fit {cast.dtype}", where="the merged weights", fix="merge with --dtype bf16")
