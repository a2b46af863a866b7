"""The plan of a run as the run itself knows it: on this machine, with the processes that were started, with its data once that is read."""

from __future__ import annotations

from finetune.config.schema import Config
from finetune.data.counted import count, counts_of
from finetune.data.report import DataReport
from finetune.errors import ConfigError
from finetune.hardware import crowd_size, detect, swap_memory
from finetune.planning.plan import make_plan, refuse_hopeless
from finetune.planning.resolve import Resolved
from finetune.planning.strategy import Crowd
from finetune.training.metrics import Observer, Planned


def forecast(config: Config, report: DataReport | None = None, resolved: Resolved | None = None) -> Planned:
    """The plan of ``config`` here; the reason where there is none, since a model whose shapes are not known trains all the same."""
    world, here = crowd_size()
    data = count(config) if report is None else counts_of(report)
    try:
        plan = make_plan(config, detect(), data, crowd=Crowd(world=world, on_this_machine=here), resolved=resolved)
    except ConfigError as error:  # what is wrong with the configuration itself is said by what builds the model
        return Planned(None, error.problems[0].what)
    return Planned(plan, "")


def announce(config: Config, observer: Observer, *, first: bool, new: bool) -> None:
    """Tell the plan before data is read or a weight is loaded; the ``first`` of several processes does.

    HardwareError (exit 4) where not even the smallest micro-batch of a ``new`` run can fit; what may fit is never refused, and a run that
    goes on may compute in other types than it would choose here.
    """
    if not first:
        return
    event = forecast(config)
    observer(event)
    if new and event.plan is not None:
        refuse_hopeless(event.plan, swap_memory() if event.plan.here.machine.kind == "cpu" else 0)
