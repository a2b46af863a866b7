"""State of a run on disk: adapter, optimizer, counters; safetensors and JSON only, keyed by parameter name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.errors import DivergedError, VerificationError
from finetune.model import adalora
from finetune.model.adapters import is_adapter, read_into, save, trainable
from finetune.runs import RunDirectory, read_json, sealed_directory, verify, write_json

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    supervised_tokens: int = 0
    tokens: int = 0
    last_loss: float | None = None
    """Validation loss when it was last measured."""
    best_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None
    """What early stopping waits to see undercut."""
    evaluations_without_gain: int = 0
    stopped_early: bool = False

    def advanced(self, **changes: Any) -> Progress:
        """A copy with ``changes``."""
        return replace(self, **changes)


def save_checkpoint(run: RunDirectory, run_id: str, model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write the checkpoint of ``progress.step``; it exists whole or not at all."""
    broken = [name for name, parameter in trainable(model).items() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise DivergedError(
            f"{broken[0]} is not finite after step {progress.step}; no checkpoint was written",
            where=str(run.path),
            fix="lower optimizer.learning_rate or lengthen the warm-up; the last checkpoint is intact",
        )
    destination = run.checkpoint(progress.step)
    with sealed_directory(destination) as directory:
        save(model, directory)
        tensors, scalars = optimizer_state(optimizer, trainable(model))
        save_file(tensors, directory / OPTIMIZER)
        state: dict[str, Any] = {"run_id": run_id, "progress": asdict(progress), "optimizer": scalars}
        if adalora.is_adalora(model):
            importance, kept = adalora.rank_state(model)
            save_file(importance, directory / adalora.FILE)
            state["kept_ranks"] = kept
        write_json(directory / STATE, state)
    return destination


def load_checkpoint(directory: Path, run_id: str, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the state of ``directory`` into ``model`` and ``optimizer``; VerificationError where anything does not fit exactly."""
    verify(directory)
    state = read_json(directory / STATE)
    if state.get("run_id") != run_id:
        raise VerificationError("the checkpoint belongs to another run", where=str(directory), fix="remove it from this run directory")
    load_weights(directory, model)
    load_optimizer_state(optimizer, trainable(model), load_file(directory / OPTIMIZER), state["optimizer"])
    if adalora.is_adalora(model):
        adalora.load_rank_state(model, load_file(directory / adalora.FILE), state["kept_ranks"])
    return Progress(**state["progress"])


def load_weights(directory: Path, model: Any) -> None:
    """Put the trained weights of a checkpoint into ``model``; VerificationError where one is left over or missing."""
    if is_adapter(model):
        read_into(model, directory)
        return
    weights = {name: tensor for path in sorted(directory.glob("model*.safetensors")) for name, tensor in load_file(path).items()}
    unexpected = list(model.load_state_dict(weights, strict=False).unexpected_keys)
    unexpected += sorted(set(trainable(model)) - set(weights))
    if unexpected:
        raise VerificationError(
            f"the checkpoint does not fit the model: {unexpected[0]}", where=str(directory), fix="resume with the same configuration"
        )


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float | int]]]:
    """The optimizer's state keyed by parameter name: tensors for safetensors, plain numbers for JSON."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float | int]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                # A clone: bitsandbytes shares one quantization map between all states, and safetensors refuses shared memory.
                tensors[f"{name}/{key}"] = value.detach().cpu().clone().contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Mapping[str, float | int]],
) -> None:
    """Inverse of `optimizer_state`; VerificationError for a state of a parameter that does not train."""
    names = {key.rsplit("/", 1)[0] for key in tensors} | set(scalars)
    if unknown := sorted(names - set(parameters)):
        raise VerificationError(
            f"the optimizer state names {unknown[0]}, which does not train here", where=OPTIMIZER, fix="resume with the same configuration"
        )
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    states: dict[str, dict[str, Any]] = {name: dict(scalars.get(name, {})) for name in names}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        # torch keeps the step counter on the CPU, but where the update is fused
        on_host = field == "step" and not groups[parameters[name]].get("fused")
        states[name][field] = tensor if on_host else tensor.to(parameters[name].device)
    for name, state in states.items():
        _restore(optimizer, parameters[name], state)


def _restore(optimizer: Any, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
    """Hand ``state`` to ``optimizer``; a paged one gets it in the memory it would have taken for itself."""
    if not getattr(optimizer, "is_paged", False):
        optimizer.state[parameter] = state
        return
    places = ((g, p) for g, group in enumerate(optimizer.param_groups) for p, other in enumerate(group["params"]) if other is parameter)
    group, place = next(places)
    optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
    own = optimizer.state[parameter]
    for field, value in state.items():
        if isinstance(value, torch.Tensor):
            own[field].copy_(value)
        else:
            own[field] = value


def rotate(run: RunDirectory, keep: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, by step and only once the newest verifies (pitfall B6)."""
    steps = run.checkpoint_steps()
    if not steps:
        return
    verify(run.checkpoint(steps[-1]))
    for step in steps[:-keep]:
        if step != best_step:
            shutil.rmtree(run.checkpoint(step))
