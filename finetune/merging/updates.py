"""What adapters do to a weight W0 (d_out, d_in), method by method, in fp32.

LoRA, rsLoRA   W0 + s BA                                     2106.09685, 2312.03732
DoRA           m (W0 + s BA) / ||W0 + s BA|| per output row  2402.09353, equation 5
embedding      W0 + s (BA)^T; DoRA's norm per column, as PEFT defines it
AdaLoRA        W0 + s P diag(e) Q                            2303.10512
VeRA           W0 + diag(b) B diag(d) A                      2310.11454; A and B are cut to the weight's shape
IA3            diag(l) W0 (and the bias), or W0 diag(l)      2205.05638
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import VerificationError

Take = Callable[[str], Tensor]
"""Reads a tensor of the adapter, fp32, onto the device of the arithmetic."""
Shape = Callable[[str], tuple[int, ...]]
"""Shape of a tensor of the adapter."""
Sides = tuple[int | None, int | None]
"""(rows, columns) of the weight that an update fits; None where any number will do."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A LoRA on one module: the keys of its tensors and its scale."""

    a: str
    b: str
    scale: float
    """s = alpha/r, or alpha/sqrt(r) for rsLoRA."""
    rank: int
    magnitude: str | None
    """DoRA's magnitude, where the adapter has one."""
    embedding: bool
    """Whether A is (r, vocabulary) and B (d, r), so that the update is s (BA)^T."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All its tensors."""
        return tuple(key for key in (self.a, self.b, self.magnitude) if key)

    def rows(self, tensors: Mapping[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
        """The part of its ``tensors`` that ``count`` rows of a linear layer's weight need: A is for all of them."""
        return {key: tensor if key == self.a else tensor[start : start + count] for key, tensor in tensors.items()}

    def require_rows(self, count: int, tensors: Mapping[str, Tensor]) -> None:
        """VerificationError unless DoRA's magnitude has one value for each of ``count`` rows of a linear layer's weight."""
        if self.magnitude is not None and tensors[self.magnitude].numel() != count:
            shape = tuple(tensors[self.magnitude].shape)
            raise VerificationError(f"{self.magnitude} has the shape {shape}, not one value for each of {count}")

    def sides(self, shape: Shape) -> Sides:
        """Shape of the weight."""
        d_out, d_in = shape(self.b)[0], shape(self.a)[1]
        return (d_in, d_out) if self.embedding else (d_out, d_in)

    def on_weight(self, values: Tensor, take: Take, corrected: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` with the update, in place where possible; ``corrected`` takes LoftQ's start away before magnitudes are applied."""
        a, b = take(self.a), take(self.b)
        left, right = (a.T, b.T) if self.embedding else (b, a)
        values = corrected(values.addmm_(left, right, alpha=self.scale))
        if self.magnitude is None:
            return values
        norms = torch.linalg.vector_norm(values, dim=0 if self.embedding else 1, keepdim=True)
        magnitude = take(self.magnitude)
        if magnitude.numel() != norms.numel():
            raise VerificationError(f"{self.magnitude} has the shape {tuple(magnitude.shape)}, not one value for each of {norms.numel()}")
        return values.mul_(magnitude.reshape(norms.shape) / norms)


@dataclass(frozen=True, slots=True)
class SingularUpdate:
    """AdaLoRA: P is `b` (d_out, r), Q is `a` (r, d_in), the singular values are `e` (r, 1); pruned ones are zero or cut off."""

    a: str
    b: str
    e: str
    scale: float
    """s as PEFT computes it: alpha / (rank at the start + 1e-5)."""

    def sides(self, shape: Shape) -> Sides:
        """Shape of the weight."""
        return shape(self.b)[0], shape(self.a)[1]

    def on_weight(self, values: Tensor, take: Take, corrected: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` with the update, in place."""
        a, b, e = take(self.a), take(self.b), take(self.e)
        return corrected(values.addmm_(b, a * e, alpha=self.scale))


@dataclass(frozen=True, slots=True)
class SharedUpdate:
    """VeRA: random `a` (r, widest d_in) and `b` (widest d_out, r) that all modules share; trained `inner` d (r,) and `outer` b (d_out,)."""

    a: str
    b: str
    inner: str
    outer: str

    def sides(self, shape: Shape) -> Sides:
        """The rows of the weight; its columns may be any number up to the width of A."""
        return shape(self.outer)[0], None

    def on_weight(self, values: Tensor, take: Take, corrected: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` with the update, in place."""
        rows, columns = values.shape
        a, b, inner, outer = take(self.a), take(self.b), take(self.inner), take(self.outer)
        if a.shape[1] < columns or b.shape[0] < rows:
            raise VerificationError(f"the projections {tuple(b.shape)} x {tuple(a.shape)} do not cover a weight of {rows} x {columns}")
        return corrected(values.addmm_(outer[:, None] * b[:rows], inner[:, None] * a[:, :columns]))


@dataclass(frozen=True, slots=True)
class Scaling:
    """IA3: a factor for each output of a module (d_out, 1), its bias included, or for each of its inputs (1, d_in)."""

    key: str
    of_inputs: bool

    def sides(self, shape: Shape) -> Sides:
        """The scaled side of the weight."""
        rows, columns = shape(self.key)
        return (None, columns) if self.of_inputs else (rows, None)

    def on_weight(self, values: Tensor, take: Take, corrected: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` scaled, in place."""
        return corrected(values.mul_(take(self.key)))


Update = LowRankUpdate | SingularUpdate | SharedUpdate | Scaling
