"""PiSSA (2404.02948) and OLoRA (2406.01775): the adapter starts as a part of the weight, which leaves the base.

    PiSSA   U S V^T = the r largest singular directions of W;   B = U sqrt(S/s),  A = sqrt(S/s) V^T
    OLoRA   Q R = W;                                            B = Q_r,          A = R_r / s

so that s B A is that part whatever alpha and the rank are, and training starts on W - s B A. (PEFT's OLoRA does not divide by s: with s = 2
its base is W - 2 Q_r R_r.) The base that is left is rounded to the type it was loaded in.

The finished adapter is stored as a plain LoRA on W, which any tool can load, switch off and merge:

    s B A - s B0 A0 = s [B, -B0] [A; A0]      of rank 2r

Its factors are brought into balance by an SVD in fp64, so that the two large parts cancel there and not in the reader's bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.schema import OloraInit, PissaInit
from finetune.errors import ConfigError, VerificationError
from finetune.model.adapters import WEIGHTS
from finetune.model.computed_start import Computed, Progress, StartReport, apply_start
from finetune.model.correction import MOVED, Corrections, Factors, ModuleCorrection
from finetune.model.lora import ADAPTER, lora_layers, patterns
from finetune.model.low_rank import padded, truncated_svd
from finetune.model.quantize import is_quantized
from finetune.planning.ranks import Strength


def principal(weight: Tensor, rank: int, scale: float, *, exact: bool = False) -> Factors:
    """PiSSA's start for ``weight`` (d_out, d_in): s B A are its ``rank`` largest singular directions."""
    u, sigma, v = truncated_svd(weight.float(), rank, exact=exact)
    root = (sigma / scale).sqrt()
    b, a = padded(u * root, root[:, None] * v, rank)
    return Factors(a, b, scale)


def orthonormal(weight: Tensor, rank: int, scale: float) -> Factors:
    """OLoRA's start for ``weight`` (d_out, d_in): s B A are the first ``rank`` columns of Q times rows of R."""
    q, r = torch.linalg.qr(weight.float())
    b, a = padded(q[:, :rank], r[:rank] / scale, rank)
    return Factors(a, b, scale)


@dataclass(frozen=True, slots=True)
class Moved:
    """PiSSA or OLoRA as a start that is computed from the weights of the loaded base."""

    init: PissaInit | OloraInit
    dtype: torch.dtype
    """What the base was loaded in."""
    file: str = MOVED
    two_parts: bool = False

    @property
    def name(self) -> str:
        """The method's own."""
        return self.init.method

    def settings(self) -> dict[str, object]:
        """The method's options, and the type that the weights were rounded to."""
        return {"init": self.init.model_dump(mode="json"), "dtype": str(self.dtype)}

    def weight(self, _name: str, layer: Any) -> Tensor:
        """W as it was loaded."""
        weight: Tensor = layer.get_base_layer().weight
        return weight

    def compute(self, weight: Tensor, rank: int, scale: float) -> Computed:
        """The part of ``weight`` that the adapter starts as."""
        match self.init:
            case PissaInit():
                start = principal(weight, rank, scale, exact=self.init.exact)
            case OloraInit():
                start = orthonormal(weight, rank, scale)
        norm = float(weight.float().norm())
        left = float(start.added_to(weight, -1.0).norm())
        return Computed(ModuleCorrection(start, None), 0.0, left / norm if norm else 0.0)

    def move_base(self, _name: str, layer: Any, correction: ModuleCorrection) -> None:
        """W - s B A, in the type of W."""
        weight = layer.get_base_layer().weight
        weight.copy_(correction.start.added_to(weight, -1.0))


def apply_moved(model: Any, base_dir: Path, init: PissaInit | OloraInit, progress: Progress | None = None) -> StartReport:
    """Move a part of each target's weight into the fresh adapter of ``model``; LoRA on embeddings keeps its default start.

    ConfigError where a target is quantized: the part that leaves the base would have to be quantized anew.
    """
    layers = _plain_layers(model)
    dtype = next(iter(layers.values())).get_base_layer().weight.dtype
    return apply_start(layers, Moved(init, dtype), base_dir, progress)


def _plain_layers(model: Any) -> dict[str, Any]:
    layers = lora_layers(model)
    quantized = next((name for name, layer in layers.items() if is_quantized(layer.get_base_layer())), None)
    if quantized or not layers:
        what = f"{quantized} is quantized" if quantized else "no target is a linear layer"
        fix = "use init: {method: loftq}" if quantized else "set tuning.targets"
        raise ConfigError(f"PiSSA and OLoRA take a part out of unquantized linear layers, and {what}", where="tuning.init", fix=fix)
    return layers


@torch.no_grad()
def restore_moved(model: Any, directory: Path) -> None:
    """Take the start that is stored in ``directory`` out of the base of ``model``, freshly loaded, so that its checkpoints fit."""
    layers = _plain_layers(model)
    with Corrections(directory, MOVED) as corrections:
        if corrections.modules != set(layers):
            what = "the start is not of this model's targets"
            raise VerificationError(what, where=str(directory / MOVED), fix="resume with the run's config")
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight
            weight.copy_(corrections.read(name).start.added_to(weight, -1.0))


# --- export ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_plain(model: Any, start_dir: Path, directory: Path) -> None:
    """Write the adapter of ``model`` into ``directory`` as a plain LoRA on the untouched base; ``start_dir`` holds its start.

    Everything else that the adapter holds (LoRA on embeddings, magnitudes, whole copies) is written as it is. What was written is read
    back (pitfall B9).
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # cloned: a copy of tied embeddings is the head's too, and a file holds no tensor twice
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    modules = _embedding_strengths(model)
    with Corrections(start_dir, MOVED) as corrections:
        for name, layer in lora_layers(model).items():
            trained = Factors(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, float(layer.scaling[ADAPTER]))
            plain = difference(trained, corrections.read(name).start)
            tensors[f"base_model.model.{name}.lora_A.weight"] = plain.a.cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = plain.b.cpu().contiguous()
            modules[name] = Strength(plain.a.shape[0], plain.scale * plain.a.shape[0])
    directory.mkdir(parents=True, exist_ok=True)
    _plain_config(model.peft_config[ADAPTER], modules).save_pretrained(str(directory))
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    stored = load_file(directory / WEIGHTS)
    wrong = sorted(key for key in tensors.keys() | stored.keys() if key not in stored or not torch.equal(stored[key], tensors[key]))
    if wrong:
        what = f"the adapter tensor {wrong[0]} differs from the file"
        raise VerificationError(what, where=str(directory / WEIGHTS), fix="check the disk")


def difference(trained: Factors, start: Factors) -> Factors:
    """Factors of rank 2r whose s B A is that of ``trained`` less that of ``start``; each carries the root of the singular values.

    Where 2r exceeds min(d_out, d_in) the rank is that, and nothing is lost.
    """
    b = torch.cat([trained.b.double(), -start.b.to(trained.b.device).double()], dim=1)
    a = torch.cat([trained.a.double(), start.a.to(trained.a.device).double()])
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma.sqrt()
    return Factors(((root[:, None] * v) @ q_a.T).float(), (q_b @ u * root).float(), trained.scale)


def _embedding_strengths(model: Any) -> dict[str, Strength]:
    """LoRA on embeddings, which starts at nothing: rank, and the alpha that keeps its scale without rsLoRA."""
    return {
        name: Strength(module.r[ADAPTER], module.scaling[ADAPTER] * module.r[ADAPTER])
        for name, module in model.get_base_model().named_modules()
        if ADAPTER in getattr(module, "lora_embedding_A", {})
    }


def _plain_config(config: Any, modules: Mapping[str, Strength]) -> Any:
    """``config`` for ``modules``, with s = alpha/r whatever the run's scaling was: alpha carries the scale."""
    usual = max(modules.values(), key=list(modules.values()).count)
    return replace(config, r=usual.rank, lora_alpha=usual.alpha, use_rslora=False, inference_mode=True, **patterns(modules, usual))
