"""State of a run on disk: adapter, optimizer, counters; safetensors and JSON only, keyed by parameter name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import DivergedError, VerificationError
from finetune.model import adalora
from finetune.model.adapters import contents, is_adapter, read_into, trainable
from finetune.runs import RunDirectory
from finetune.sealed import read_json, remove_directory, sealed_directory, verify, write_json

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
    evaluation_due: bool = False
    """The validation of this step is still to be done: a signal came before its end."""
    samples_due: bool = False
    """The same of its samples."""

    def advanced(self, **changes: Any) -> Progress:
        """A copy with ``changes``."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment, in memory that training does not touch: it can be written while the next steps run."""

    progress: Progress
    state: Mapping[str, Any]
    """state.json."""
    files: Mapping[str, Mapping[str, torch.Tensor]]
    """File name -> tensors on the CPU."""
    write_config: Callable[[Path], None]
    """Writes the adapter's configuration into a directory."""


def take_snapshot(where: Path, run_id: str, model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> Snapshot:
    """Copy all that a checkpoint holds; DivergedError where a trained weight is not finite (``where``: the run, for the message)."""
    parameters = trainable(model)
    tensors, scalars = optimizer_state(optimizer, parameters)
    broken = [name for name, tensor in {**parameters, **tensors}.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DivergedError(
            f"{broken[0]} is not finite after step {progress.step}; no checkpoint was written",
            where=str(where),
            fix="lower optimizer.learning_rate or lengthen the warm-up; the last checkpoint is intact",
        )
    adapter = contents(model)
    files = {adapter.file: {name: _copy(tensor) for name, tensor in adapter.tensors.items()}, OPTIMIZER: tensors}
    state: dict[str, Any] = {"run_id": run_id, "progress": asdict(progress), "optimizer": scalars}
    if adalora.is_adalora(model):
        importance, state["kept_ranks"] = adalora.rank_state(model)
        files[adalora.FILE] = {name: _copy(tensor) for name, tensor in importance.items()}
    return Snapshot(progress, copy.deepcopy(state), files, adapter.write_config)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU, contiguous and in memory of its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def write_checkpoint(run: RunDirectory, snapshot: Snapshot) -> Path:
    """Write ``snapshot`` as the checkpoint of its step and read it back; it exists whole or not at all (pitfalls B1, B9).

    HardwareError where the disk does not take it, VerificationError where what was written is not what was to be.
    """
    destination = run.checkpoint(snapshot.progress.step)
    with sealed_directory(destination) as directory:
        for name, tensors in snapshot.files.items():
            save_file(dict(tensors), directory / name, metadata={"format": "pt"})
            _require_written(directory / name, tensors)
        snapshot.write_config(directory)
        write_json(directory / STATE, snapshot.state)
    return destination


def _require_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors and path.name not in (OPTIMIZER, adalora.FILE):  # those know nothing before the first step
        raise VerificationError("there is nothing to save: no tensor trains", where=str(path), fix="check tuning.targets")
    with safe_open(path, "pt") as stored:
        if set(stored.keys()) != set(tensors) or not all(torch.equal(stored.get_tensor(name), tensors[name]) for name in tensors):
            raise VerificationError("what was written is not what was to be saved", where=str(path), fix="check the disk")


_STATES = {"lion": 1.0, "lion-8bit": 1.0}
"""States an optimizer keeps of each weight; 2 for all others."""
_SMALL = 4096
"""bitsandbytes keeps the states of tensors with fewer elements in 32 bits."""
_FRAME = 4096
"""What comes with each parameter: names, shapes, and the maps of 8-bit states."""


def checkpoint_bytes(model: Any, method: str) -> int:
    """About what a checkpoint of ``model`` takes on disk once the optimizer ``method`` has states; rather too much than too little."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in contents(model).tensors.values())
    for parameter in trainable(model).values():
        eight = method.endswith("-8bit") and parameter.numel() >= _SMALL
        state = 1.1 if eight else parameter.element_size()  # a byte and its share of the block's scale
        averages = 2.0 if adalora.is_adalora(model) else 0.0
        total += int(parameter.numel() * (averages * parameter.element_size() + _STATES.get(method, 2.0) * state)) + _FRAME
    return int(total * 1.02) + 2**16


def read_progress(directory: Path, run_id: str) -> Progress:
    """Where the checkpoint in ``directory``, which was verified, stands; VerificationError where it is not one of the run ``run_id``."""
    state = read_json(directory / STATE)
    if state.get("run_id") != run_id:
        raise VerificationError("the checkpoint belongs to another run", where=str(directory), fix="remove it from this run directory")
    return Progress(**state["progress"])


def load_checkpoint(directory: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of ``directory``, which was verified, into ``model`` and ``optimizer``; VerificationError where it does not fit."""
    state = read_json(directory / STATE)
    load_weights(directory, model)
    load_optimizer_state(optimizer, trainable(model), load_file(directory / OPTIMIZER), state["optimizer"])
    if adalora.is_adalora(model):
        adalora.load_rank_state(model, load_file(directory / adalora.FILE), state["kept_ranks"])


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
                # A copy of its own: bitsandbytes shares one quantization map between all states, and safetensors refuses shared memory.
                tensors[f"{name}/{key}"] = _copy(value)
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


def rotate(run: RunDirectory, newest: int, keep: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, by step and only once that of step ``newest`` verifies.

    Time stamps are not looked at (pitfall B6). A checkpoint after ``newest`` can only be a stranger, and is left alone.
    """
    verify(run.checkpoint(newest))
    for step in [step for step in run.checkpoint_steps() if step <= newest][:-keep]:
        if step != best_step:
            remove_directory(run.checkpoint(step))
