"""`finetune plan`: its options, and what it says on a screen of 80 columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.options import ConfigPath, Json, Overrides

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.planning.fit import Change
    from finetune.planning.placement import Placement
    from finetune.planning.plan import Plan
    from finetune.planning.throughput import Cost

_GIB = 2**30
_WIDEST = 100
_LEAST_ENERGY = 0.01
"""Kilowatt-hours below which no number is shown."""

_Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="GB", help="Plan for a GPU of 24, 32, 40, 48, 80, 141 or 180 GB instead of this machine."),
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
    from finetune.cli.gpu_option import gigabytes

    loaded = api.load_config(config, override or ())
    size = None if gpu is None else gigabytes(gpu)
    found = api.plan(loaded.config, gpu=size, devices=devices, tokens_per_second=tokens_per_second)
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
    firm = ((name, count) for name, count in here.memory.parts.items() if name != "mapped")
    largest = sorted(firm, key=lambda item: -item[1])[:3]
    told = ", ".join(f"{name} {_size(count)}" for name, count in largest)
    yield f"memory: about {_size(here.claims)} of {_size(here.machine.memory_bytes)} ({told}), micro-batches of {_micro_batch(here)}"
    if not here.fits:
        yield f"this may not fit: {_advice(plan.change, here)}"
    if plan.length is not None:
        yield _duration(plan)


# --- sections ------------------------------------------------------------------------------------------------------------------------


def _name(plan: Plan) -> str:
    return plan.config.model.id.rstrip("/").rpartition("/")[2]


def _base(plan: Plan) -> str:
    method = plan.config.quantization.method
    return f"{plan.shape.total:,} parameters, {'not quantized' if method == 'none' else method}"


def _heading(plan: Plan) -> str:
    return f"{_name(plan)} ({_base(plan)}), {plan.config.tuning.method}"


def _parameters(plan: Plan) -> Table:
    from rich.text import Text

    from finetune.cli.tables import figures_table
    from finetune.cli.training_view import group_names

    found = plan.parameters
    table = figures_table("trains", "tensors", "parameters", "of all", "peak lr")
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
    from finetune.cli.tables import figures_table
    from finetune.planning.memory import PARTS

    here = plan.here
    table = figures_table(f"memory of {_devices(here)}", "GiB")
    for name, count in here.memory.parts.items():
        if count:
            table.add_row(f"{name}: {PARTS[name]}", f"{count / _GIB:.2f}")
    each = " of each process" if here.copies > 1 else ""
    table.add_row(f"together{each}, at the peak of a step", f"{here.memory.total / _GIB:.2f}")
    return table


def _switched(value: bool | str) -> str:
    return value if isinstance(value, str) else "on" if value else "off"


def _verdict(plan: Plan, width: int) -> str:
    here, choices = plan.here, plan.here.resolved
    have = f"{_size(here.claims)} of {_size(here.machine.memory_bytes)}"
    lines = [f"fits: {have}"] if here.fits else _advised(f"does not fit: {have}.", plan.change, here)
    if here.needs > here.claims:
        lines.append(
            f"{_size(here.needs - here.claims)} beside it are pages of the checkpoint's file (mapped), which the system takes back"
        )
    if here.memory.spillable and here.fits and here.claims > here.machine.memory_bytes:
        lines.append(f"{_size(here.memory.spillable)} of it, states of the optimizer, may spill to host memory")
    checkpointing = _switched(choices.gradient_checkpointing.value)
    lines += [
        f"micro-batch: {_micro_batch(here)} ({choices.tokens_per_device.reason})",
        f"precision: {choices.precision.value} ({choices.precision.reason})",
        f"gradient checkpointing: {checkpointing} ({choices.gradient_checkpointing.reason})",
        f"optimizer: {choices.optimizer.value} ({choices.optimizer.reason})",
    ]
    if here.setting.world > 1:
        lines.append(f"strategy: {choices.strategy.value} ({choices.strategy.reason})")
    return _lines(lines, width)


def _advised(finding: str, change: Change | None, placement: Placement) -> list[str]:
    """``finding`` and the smallest change: its options on a line of their own, then what it comes to."""
    from finetune.planning.plan import fix_of, needed_after, options_of

    if change is None:
        return [f"{finding} {fix_of(change, placement)}"]
    costs = "; ".join((f"then {needed_after(change, placement)}", *change.costs))
    return [f"{finding} The smallest change:", f"  {options_of(change, placement)}", f"  {costs}"]


def _advice(change: Change | None, placement: Placement) -> str:
    from finetune.planning.plan import fix_of

    if change is None:
        return fix_of(change, placement)
    return f"The smallest change: {fix_of(change, placement)}; {'; '.join(change.costs)}"


def _gpus(plan: Plan) -> Table:
    from rich.text import Text

    from finetune.cli.tables import figures_table

    many = f"{plan.here.setting.world} x " if plan.here.setting.world > 1 else ""
    columns: dict[str, list[str | Text]] = {
        "GiB": [f"{each.placement.machine.memory_bytes / _GIB:.1f}" for each in plan.candidates],
        "needed": [f"{each.placement.needs / _GIB:.1f}" for each in plan.candidates],
        "micro-batch": [f"{each.placement.setting.tokens:,}" for each in plan.candidates],
        "fits": [Text("yes", style="green") if each.placement.fits else Text("no", style="red") for each in plan.candidates],
        "tokens/s": [f"{each.speed.tokens_per_second:,.0f}" if each.placement.fits else "" for each in plan.candidates],
        "time": [_time(each.cost.seconds) if each.cost and each.placement.fits else "" for each in plan.candidates],
        "kWh": [_energy(each.cost) if each.placement.fits else "" for each in plan.candidates],
    }
    told = {heading: cells for heading, cells in columns.items() if any(cells)}
    table = figures_table("on common GPUs", *told)
    for candidate, *cells in zip(plan.candidates, *told.values(), strict=True):
        table.add_row(Text(f"{many}{candidate.gpu.name}"), *cells)
    return table


def _length(plan: Plan, config: str, width: int) -> str:
    from finetune.planning.throughput import UTILIZATION

    largest, change = plan.candidates[-1], plan.candidate_change
    lines = _advised(f"no common GPU holds it. On {largest.gpu.name}:", change, largest.placement) if change is not None else []
    if any(candidate.placement.fits for candidate in plan.candidates):
        energy = "; energy: at the most that they draw" if any(candidate.cost for candidate in plan.candidates) else ""
        lines.append(f"speed on GPUs: an estimate, {UTILIZATION:.0%} of the rate that their maker states (small models reach less){energy}")
    if plan.length is None:
        lines.append(f"rows, steps and time are unknown until the data is prepared once: finetune data stats {config}")
        return _lines(lines, width)
    counts, steps = plan.length.data, plan.length.steps
    about = "" if counts.exact else "about "
    share = plan.length.supervised_share
    loss = f", {share:.0%} of the tokens with loss" if share is not None else ""
    lines.append(f"data: {about}{counts.rows:,} training and {counts.validation_rows:,} validation rows{loss} ({counts.origin})")
    lines.append(f"steps: {about}{steps.total:,} ({steps.per_epoch:,} an epoch, the first {steps.warmup:,} warm up)")
    lines.append(_duration(plan))
    if plan.length.tokens is None:
        lines.append(f"tokens, and with them the time, are unknown until the data is prepared once: finetune data stats {config}")
    return _lines(lines, width)


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
            parts.append(f"at most {_energy(plan.cost)} kWh".replace("at most <", "less than "))
    return f"on {_devices(plan.here)}: {', '.join(parts)}"


# --- words ---------------------------------------------------------------------------------------------------------------------------


def _lines(lines: Sequence[str], width: int) -> str:
    """``lines`` within ``width`` columns, but for options, which stay on a line of their own so that they can be copied."""
    from finetune.cli.view import wrapped

    return "\n".join(line if line.startswith("  -") else wrapped(line, 2, width) for line in lines)


def _devices(placement: Placement) -> str:
    machine, world = placement.machine, placement.setting.world
    if machine.kind == "cpu":
        return f"this CPU ({machine.name}, {_size(machine.memory_bytes)})" if world == 1 else f"{world} processes on this CPU"
    return f"{world} x {machine.name} ({_size(machine.memory_bytes)})"


def _micro_batch(placement: Placement) -> str:
    """What training calls so, and what the memory was counted for where that is another number."""
    limit, filled = placement.limit, placement.setting.tokens
    told = f"up to {limit:,} tokens"
    if filled < limit:
        return f"{told}, of which a whole batch fills {filled:,}"
    return f"{told}, but one example may have {filled:,}" if filled > limit else told


def _percent(part: int, whole: int) -> str:
    from finetune.cli.training_view import share

    return share(part, whole)


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def _energy(cost: Cost | None) -> str:
    """Kilowatt-hours; nothing where they are not known."""
    if cost is None or cost.kilowatt_hours is None:
        return ""
    return f"{cost.kilowatt_hours:,.2f}" if cost.kilowatt_hours >= _LEAST_ENERGY else f"<{_LEAST_ENERGY}"


def _time(seconds: float) -> str:
    """In the two largest units that say something."""
    if seconds < 1:
        return "<1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{hours / 24:.1f} days"
