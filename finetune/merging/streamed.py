"""Measure a model directory that does not fit in memory: `python -m finetune.merging.streamed DIRECTORY PROBE RESULT DEVICE`.

The model is built by plain transformers without weights. Each module's weights are read when its turn comes in the forward pass, and
dropped when it is over, so that one weight and the activations of a pass are in memory. Rows go through together, padded on the right, up
to `TOKENS_A_PASS`: each pass reads the whole model once. The figures are those of `reload`, up to the order of sums.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from finetune.merging.reload import Measurement, Probe
from finetune.model.weights import Weights

TOKENS_A_PASS = 16384
_ROOM = 1.25
"""Memory that a model takes, by the bytes of its files."""
_BESIDES = 1 << 30
"""Bytes that a process needs besides its model."""


def is_too_large(directory: Path, device: str) -> bool:
    """Whether the model in ``directory`` does not fit in the memory that ``device`` has free, as far as that is known."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    free = _free(device)
    return free is not None and size * _ROOM + _BESIDES > free


def _free(device: str) -> int | None:
    """Free bytes of ``device``; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return None
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)


@torch.no_grad()
def measure_streamed(directory: Path, probe: Probe, device: str) -> Measurement:
    """What `finetune.merging.reload.measure` finds of the model in ``directory``; ValueError where its files and modules do not agree."""
    kept: list[Tensor] = []
    total, count = 0.0, 0
    with Weights.of_model(directory) as weights:
        model = _without_weights(directory, device)
        _read_when_needed(model, weights, device)
        for batch in _batches(probe):
            logits = _logits(model, batch, device).float()
            targets = batch.ids[batch.supervised].to(device)
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
            kept.append(logits[batch.compared[batch.supervised].to(device)].cpu())
    return Measurement(torch.cat(kept), total / count)


def _without_weights(directory: Path, device: str) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return model.eval()


def _read_when_needed(model: Any, weights: Weights, device: str) -> None:
    """Let every module of ``model`` read its own weights before it runs and drop them after."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    names = {name: tied.get(name, name) if name not in weights.info else name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrong = sorted(set(names.values()) ^ set(weights.info))
    if wrong:
        raise ValueError(f"the weights do not match the configuration: {wrong[:8]}")
    for prefix, module in model.named_modules():
        own = {part: names[f"{prefix}.{part}" if prefix else part] for part, _ in module.named_parameters(recurse=False)}
        if own:
            reader = _Reader(weights, own, device)
            module.register_forward_pre_hook(reader.read)
            module.register_forward_hook(reader.drop)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The weights of one module."""

    weights: Weights
    names: dict[str, str]
    """Name in the files by name in the module."""
    device: str

    def read(self, module: nn.Module, _inputs: object) -> None:
        for part, name in self.names.items():
            module._parameters[part] = nn.Parameter(self.weights.read(name).to(self.device), requires_grad=False)

    def drop(self, module: nn.Module, _inputs: object, _outputs: object) -> None:
        for part in self.names:
            module._parameters[part] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that go through together, padded on the right: (rows, tokens) each."""

    ids: Tensor
    attention: Tensor
    supervised: Tensor
    compared: Tensor


def _batches(probe: Probe) -> Iterator[_Batch]:
    """The rows of ``probe`` that have a supervised token, in their order, as many at a time as fit a pass."""
    lengths = probe.lengths.tolist()
    rows = zip(*(torch.split(part, lengths) for part in (probe.ids, probe.supervised, probe.compared)), strict=True)
    waiting: list[tuple[Tensor, ...]] = []
    for row in rows:
        if not row[1].any():
            continue
        if waiting and max(len(other[0]) for other in (*waiting, row)) * (len(waiting) + 1) > TOKENS_A_PASS:
            yield _padded(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _padded(waiting)


def _padded(rows: Sequence[tuple[Tensor, ...]]) -> _Batch:
    ids, supervised, compared = (pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    attention = pad_sequence([torch.ones(len(row[0]), dtype=torch.int64) for row in rows], batch_first=True)
    return _Batch(ids, attention, supervised, compared)


def _logits(model: Any, batch: _Batch, device: str) -> Tensor:
    """(supervised tokens, vocabulary) of ``batch``, row after row: the head sees the positions before them alone."""
    before = torch.zeros_like(batch.supervised)
    before[:, :-1] = batch.supervised[:, 1:]
    chosen = before.to(device)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0][chosen][None],))
    try:
        logits: Tensor = model(input_ids=batch.ids.to(device), attention_mask=batch.attention.to(device), use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process; prints what is wrong with the directory and returns 6 where weights are missing or left over."""
    directory, probe, result, device = arguments
    try:
        found = measure_streamed(Path(directory), Probe.load(Path(probe)), device)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 6
    save_file({"logits": found.logits, "loss": torch.tensor(found.loss, dtype=torch.float64)}, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
