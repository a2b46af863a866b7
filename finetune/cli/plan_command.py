"""`finetune plan`: its options, and what it says on a screen of 80 columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.options import ConfigPath, Json, Overrides

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.planning.fit import Change
    from finetune.planning.placement import Placement
    from finetune.planning.plan import Plan

_GIB = 2**30
_WIDEST = 100

_Gpu = Annotated[
    int | None,
    typer.Option("--gpu", metavar="GIB", help="Plan for a GPU of 24, 32, 40, 48, 80, 141 or 180 GB instead of this machine."),
]
_Devices = Annotated[int, typer.Option("--devices", min=1, help="Devices that train together.")]
_Speed = Annotated[
    float | None,
    typer.Option("--tokens-per-second", min=0.001, help="Speed over all devices, for time and energy. Default: measured or estimated."),
]


def plan(
    config: ConfigPath,
    override: Overrides = None,
    gpu: _Gpu = None,
    devices: _Devices = 1,
    tokens_per_second: _Speed = None,
    as_json: Json = False,
) -> None:
    """Say what a run will be before it costs: parameters, memory, which GPUs hold it, steps, time and energy.

    Needs neither weights nor a GPU nor the network: shapes come from config.json, those of the usual families are known.
    """
    loaded = api.load_config(config, override or ())
    found = api.plan(loaded.config, gpu=gpu, devices=devices, tokens_per_second=tokens_per_second)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
    else:
        show(found, str(config))


def show(plan: Plan, config: str) -> None:
    """All of ``plan``; ``config`` is how the user calls its file."""
    from rich.text import Text

    from finetune.cli import view

    width = min(view.out.width, _WIDEST)
    for part in (_heading(plan), _parameters(plan), _memory(plan), _verdict(plan, width), _gpus(plan), _length(plan, config, width)):
        block = Text(part) if isinstance(part, str) else part
        view.out.print(block, soft_wrap=isinstance(part, str), width=None if isinstance(part, str) else width)
        view.out.print()


def short(plan: Plan) -> Iterator[str]:
    """The plan in three or four lines, for the beginning of a run."""
    parameters, here = plan.parameters, plan.here
    added = "" if parameters.in_base else f" beside {_name(plan)}"
    yield f"Plan: {parameters.trainable:,} parameters train{added} ({_base(plan)}), on {_devices(here)}."
    largest = sorted(here.memory.parts.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{name} {_size(count)}" for name, count in largest)
    yield f"memory: about {_size(here.needs)} of {_size(here.machine.memory_bytes)} ({told}), {_micro_batch(here)}"
    if not here.fits:
        yield f"this may not fit: {_advice(plan.change, here)}"
    if plan.length is not None:
        yield _duration(plan)


# --- sections ------------------------------------------------------------------------------------------------------------------------


def _table(first: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _name(plan: Plan) -> str:
    return plan.config.model.id.rstrip("/").rpartition("/")[2]


def _base(plan: Plan) -> str:
    method = plan.config.quantization.method
    return f"{plan.shape.total:,} parameters, {'not quantized' if method == 'none' else method}"


def _heading(plan: Plan) -> str:
    return f"{_name(plan)} ({_base(plan)}), {plan.config.tuning.method}"


def _parameters(plan: Plan) -> Table:
    from rich.text import Text

    from finetune.cli.training_view import group_names

    found = plan.parameters
    table = _table("trains", "tensors", "parameters", "of all", "peak lr")
    names = group_names([group.summary() for group in found.groups], plan.here.resolved.optimizer.value)
    for name, group in zip(names, found.groups, strict=True):
        share, rate = _percent(group.parameters, found.total), f"{group.learning_rate:.1e}"
        table.add_row(Text(name), f"{len(group.names):,}", f"{group.parameters:,}", share, rate)
    if len(names) > 1:
        table.add_row("together", f"{len(found.tensors):,}", f"{found.trainable:,}", _percent(found.trainable, found.total), "")
    for note in found.notes:
        table.add_row(Text(f"  {note}", style="dim"))
    return table


def _memory(plan: Plan) -> Table:
    from finetune.planning.memory import PARTS

    here = plan.here
    table = _table(f"memory of {_devices(here)}", "GiB")
    for name, count in here.memory.parts.items():
        if count:
            table.add_row(f"{name}: {PARTS[name]}", f"{count / _GIB:.2f}")
    each = " of each process" if here.copies > 1 else ""
    table.add_row(f"together{each}, at the peak of a step", f"{here.memory.total / _GIB:.2f}")
    return table


def _verdict(plan: Plan, width: int) -> str:
    from finetune.cli.view import wrapped

    here, choices = plan.here, plan.here.resolved
    have = f"{_size(here.needs)} of {_size(here.machine.memory_bytes)}"
    lines = [f"fits: {have}" if here.fits else f"does not fit: {have}. {_advice(plan.change, here)}"]
    if here.memory.spillable and here.fits and here.needs > here.machine.memory_bytes:
        lines.append(f"{_size(here.memory.spillable)} of it, states of the optimizer, may spill to host memory")
    checkpointing = "on" if choices.gradient_checkpointing.value else "off"
    lines += [
        f"micro-batch: {here.setting.tokens:,} tokens ({choices.tokens_per_device.reason})",
        f"precision: {choices.precision.value} ({choices.precision.reason})",
        f"gradient checkpointing: {checkpointing} ({choices.gradient_checkpointing.reason})",
        f"optimizer: {choices.optimizer.value} ({choices.optimizer.reason})",
    ]
    if here.setting.world > 1:
        lines.append(f"strategy: {choices.strategy.value} ({choices.strategy.reason})")
    return "\n".join(wrapped(line, 2, width) for line in lines)


def _advice(change: Change | None, placement: Placement) -> str:
    from finetune.planning.plan import fix_of

    if change is None:
        return fix_of(change, placement)
    return f"The smallest change: {fix_of(change, placement)}; {'; '.join(change.costs)}"


def _gpus(plan: Plan) -> Table:
    from rich.text import Text

    many = f"{plan.here.setting.world} x " if plan.here.setting.world > 1 else ""
    table = _table("on common GPUs", "GiB", "needed", "micro-batch", "fits", "tokens/s", "time", "kWh")
    for candidate in plan.candidates:
        placement, cost = candidate.placement, candidate.cost
        fits = placement.fits
        table.add_row(
            Text(f"{many}{candidate.gpu.name}"),
            f"{placement.machine.memory_bytes / _GIB:.1f}",
            f"{placement.needs / _GIB:.1f}",
            f"{placement.setting.tokens:,}",
            Text("yes" if fits else "no", style="green" if fits else "red"),
            f"{candidate.speed.tokens_per_second:,.0f}" if fits else "",
            _time(cost.seconds) if cost and fits else "",
            f"{cost.kilowatt_hours:,.2f}" if cost and fits and cost.kilowatt_hours is not None else "",
        )
    return table


def _length(plan: Plan, config: str, width: int) -> str:
    from finetune.cli.view import wrapped
    from finetune.planning.throughput import UTILIZATION

    lines = [
        f"speed on GPUs: an estimate, {UTILIZATION:.0%} of the rate that their maker states (small models reach less); energy: at the most "
        "that they draw"
    ]
    change = plan.candidate_change
    if change is not None:
        lines.insert(0, f"no common GPU holds it. On {plan.candidates[-1].gpu.name}: {_advice(change, plan.candidates[-1].placement)}")
    if plan.length is None:
        lines.append(f"rows, steps and time are unknown until the data is prepared once: finetune data stats {config}")
        return "\n".join(wrapped(line, 2, width) for line in lines)
    counts, steps = plan.length.data, plan.length.steps
    about = "" if counts.exact else "about "
    share = plan.length.supervised_share
    loss = f", {share:.0%} of the tokens with loss" if share is not None else ""
    lines.append(f"data: {about}{counts.rows:,} training and {counts.validation_rows:,} validation rows{loss} ({counts.origin})")
    lines.append(f"steps: {about}{steps.total:,} ({steps.per_epoch:,} an epoch, the first {steps.warmup:,} warm up)")
    lines.append(_duration(plan))
    if plan.length.tokens is None:
        lines.append(f"tokens, and with them the time, are unknown until the data is prepared once: finetune data stats {config}")
    return "\n".join(wrapped(line, 2, width) for line in lines)


def _duration(plan: Plan) -> str:
    """Steps, tokens, time and energy on the device, as far as they are known."""
    assert plan.length is not None
    about = "" if plan.length.data.exact else "about "
    parts = [f"{about}{plan.length.steps.total:,} steps"]
    if plan.length.tokens is not None:
        parts.append(f"{plan.length.tokens:,} tokens")
    if plan.speed is not None:
        parts.append(f"{plan.speed.tokens_per_second:,.0f} tokens a second ({plan.speed.origin}: {plan.speed.reason})")
    if plan.cost is not None:
        parts.append(f"{_time(plan.cost.seconds)} without evaluations and checkpoints")
        if plan.cost.kilowatt_hours is not None:
            parts.append(f"at most {plan.cost.kilowatt_hours:,.2f} kWh")
    return f"on {_devices(plan.here)}: {', '.join(parts)}"


# --- words ---------------------------------------------------------------------------------------------------------------------------


def _devices(placement: Placement) -> str:
    machine, world = placement.machine, placement.setting.world
    if machine.kind == "cpu":
        return f"this CPU ({machine.name}, {_size(machine.memory_bytes)})" if world == 1 else f"{world} processes on this CPU"
    return f"{world} x {machine.name} ({_size(machine.memory_bytes)})"


def _micro_batch(placement: Placement) -> str:
    return f"micro-batches of {placement.setting.tokens:,} tokens"


def _percent(part: int, whole: int) -> str:
    from finetune.cli.training_view import share

    return share(part, whole)


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def _time(seconds: float) -> str:
    """In the two largest units that say something."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{hours / 24:.1f} days"
