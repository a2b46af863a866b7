"""The verbs of finetune for programs and for the command line.

Every library, pydantic included, is imported inside the functions, so that `finetune --help` answers at once and only the commands that
need torch load it. Over 300 lines: one function a verb, each a few lines over its own stage, so that no seam parts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from finetune.process import loading

if TYPE_CHECKING:
    from finetune.analysis.analyze import Analysis
    from finetune.analysis.signal import SignalReport
    from finetune.config.load import Loaded
    from finetune.config.schema import Config
    from finetune.config.sweep import Planned
    from finetune.evaluation.results import Results
    from finetune.inventory import Inventory
    from finetune.merging.combine_report import CombineReport
    from finetune.merging.exports import ExportReport
    from finetune.merging.merge import MergeReport
    from finetune.planning.plan import Plan
    from finetune.reporting.doctor import Diagnosis
    from finetune.runs import RunDirectory
    from finetune.sweeping.carry_out import Tell
    from finetune.sweeping.table import Table
    from finetune.training.inputs import Inputs
    from finetune.training.metrics import Observer

__all__ = [
    "analyze",
    "combine",
    "diagnose",
    "evaluate",
    "export",
    "inventory",
    "launch",
    "load_config",
    "load_sweep",
    "merge",
    "named_results",
    "padding_share",
    "places",
    "plan",
    "prepare_data",
    "report",
    "report_png",
    "require_png",
    "spectrum",
    "stored_results",
    "sweep",
    "train",
]


def load_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """The validated configuration of a YAML file; ConfigError with every problem at once."""
    from finetune.config.load import load_config as load

    return load(path, overrides)


def plan(config: Config, *, gpu: int | None = None, devices: int = 1, tokens_per_second: float | None = None) -> Plan:
    """What a run of ``config`` will be on ``devices`` of this machine, or of a ``gpu`` of so many GB; loads neither weights nor torch."""
    from finetune.data.counted import count
    from finetune.hardware import survey
    from finetune.planning.placement import machine_of_size
    from finetune.planning.plan import make_plan
    from finetune.planning.strategy import Crowd
    from finetune.planning.throughput import stated_speed
    from finetune.reporting.speed import speed_of_run

    machine = survey() if gpu is None else machine_of_size(gpu, devices)
    speed = speed_of_run(config, machine, devices) if tokens_per_second is None else stated_speed(tokens_per_second)
    return make_plan(config, machine, count(config), crowd=Crowd(world=devices, on_this_machine=devices), speed=speed)


def prepare_data(config: Config, progress: Callable[[str, int, int], None] = lambda *_: None) -> Inputs:
    """The renderer, the examples and the report on them, as `train` would see them; ``progress(stage, done, of)`` follows the work."""
    with loading():
        from finetune.training.inputs import gather

    return gather(config, progress)


def padding_share(config: Config, inputs: Inputs) -> float:
    """Share of padding in what training would compute."""
    from finetune.training.padding import padding_share as expected

    return expected(inputs.data.train.lengths.tolist(), config, inputs.resolved.tokens_per_device.value)


def train(
    config: Config,
    observer: Observer | None = None,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    origins: Mapping[str, object] | None = None,
) -> RunDirectory:
    """Train as ``config`` says; returns the finished run directory. ``accept``: keys that may have changed since it was begun;
    ``origins``: where its values came from (`load_config(...).origins`), which the run's report shows."""
    with loading():
        from finetune.training.metrics import ignore
        from finetune.training.train import train as run_training

    return run_training(config, observer or ignore, resume=resume, accept=accept, origins=origins)


def launch(arguments: Sequence[str], devices: int | None) -> int | None:
    """Start one worker a device where more than one is wanted; returns their exit code, or None where this process is to train alone."""
    with loading():
        from finetune.training.launch import launch as start_workers

    return start_workers(arguments, devices)


class EvaluationSettings(TypedDict, total=False):
    """Further arguments of `evaluate`."""

    settings: Path | None
    """A YAML file with the `evaluation` section to use instead of the run's."""
    base: str | None
    """The model under adapter directories that do not know theirs."""
    name: str | None
    """Of the results, which are kept in `eval/NAME.json` of the first run, or of the working directory."""
    progress: Callable[[str, str, int], None]
    notice: Callable[[str], None]
    """Told which earlier results will be replaced, once the first items were measured: what cannot be measured replaces nothing."""


def evaluate(
    target: Path | str, others: Sequence[Path | str] = (), overrides: Sequence[str] = (), **further: Unpack[EvaluationSettings]
) -> Results:
    """Measure runs, adapters and models side by side with what they were trained from."""
    from finetune.evaluation.request import evaluation_request

    request = evaluation_request([target, *others], overrides, further.get("settings"), base=further.get("base"), name=further.get("name"))
    progress, notice = further.get("progress"), further.get("notice")
    pending = [request.replaces] if request.replaces and notice else []
    with loading():
        from finetune.evaluation.evaluate import evaluate as measure

    def advance(task: str, system: str, count: int) -> None:
        if pending and notice:
            notice(pending.pop())
        if progress:
            progress(task, system, count)

    return measure(request, advance)


class MergeSettings(TypedDict, total=False):
    """Further arguments of `merge`; each means what `finetune.merging.merge.MergeOptions` says of it."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"]
    rounding: Literal["nearest", "stochastic"]
    seed: int
    compare_dtypes: bool
    compare_bases: bool
    force: bool
    progress: Callable[[int, int], None] | None


def merge(
    run: Path, destination: Path, *, base: Literal["dequantized", "original"] = "dequantized", **settings: Unpack[MergeSettings]
) -> MergeReport:
    """Fold a finished run's adapter into its base and prove the result by reloading it."""
    from finetune.runs import open_run

    found = open_run(run)
    config = load_config(found.config).config
    with loading():
        from finetune.merging.merge import MergeOptions
        from finetune.merging.merge_run import merge_run

    return merge_run(found, config, destination, base=base, options=MergeOptions(**settings))


class ExportSettings(TypedDict, total=False):
    """Further arguments of `export`; each means what `finetune.merging.exports.ExportOptions` says of it."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"]
    rank: int | None
    force: bool


def export(
    run: Path,
    destination: Path,
    kind: Literal["nf4", "adapter"],
    *,
    base: Literal["dequantized", "original"] = "dequantized",
    **settings: Unpack[ExportSettings],
) -> ExportReport:
    """A finished run as an NF4 model or as a plain adapter for serving engines, proven by loading it in a fresh process."""
    from finetune.runs import open_run

    found = open_run(run)
    config = load_config(found.config).config
    with loading():
        from finetune.merging.exports import ExportOptions
        from finetune.merging.merge_run import export_run

    return export_run(found, config, destination, base=base, options=ExportOptions(kind, **settings))


def combine(plan: Path, destination: Path, *, force: bool = False, progress: Callable[[str, int], None] = lambda *_: None) -> CombineReport:
    """Several adapters of one base as one model or one adapter, as the YAML file ``plan`` says, proven against the exact sum."""
    from finetune.config.combine_file import load_plan

    loaded = load_plan(plan)
    with loading():
        from finetune.merging.combine import combine as write

    return write(loaded, destination, force=force, progress=progress)


def analyze(runs: Sequence[Path], plot: Path | None = None, progress: Callable[[str, int], None] = lambda *_: None) -> Analysis:
    """What training did to each weight of finished ``runs``, and how alike each pair is; drawn into ``plot``."""
    from finetune.analysis.checks import require_analyzable
    from finetune.analysis.plot import check_plot_path, write_plot
    from finetune.runs import open_run

    found = [(run, load_config(run.config).config) for run in map(open_run, runs)]
    require_analyzable(found)
    if plot:
        check_plot_path(plot)
    with loading():
        from finetune.analysis.analyze import analyze as measure

    analysis = measure(found, progress)
    if plot:
        write_plot(plot, analysis.title, analysis.notes, analysis.panels())
    return analysis


def spectrum(
    model: str,
    *,
    revision: str | None = None,
    share: float = 0.5,
    plot: Path | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> SignalReport:
    """The signal-to-noise ratio of every linear layer of a hub id, directory or builtin ``model`` (Spectrum); drawn into ``plot``."""
    from finetune.analysis.checks import require_share
    from finetune.analysis.plot import check_plot_path, write_plot

    require_share(share)
    if plot:
        check_plot_path(plot)
    with loading():
        from finetune.analysis.signal import measure_signal

    report = measure_signal(model, share, revision, progress)
    if plot:
        write_plot(plot, report.title, report.notes, report.panels())
    return report


def diagnose(run: Path, against: Path | None = None, progress: Callable[[str, int], None] = lambda *_: None) -> Diagnosis:
    """What is wrong with a run, finished or not, by the rules of `finetune.reporting.doctor`; kept in RUN/doctor.json.

    ``against``: newer data, on which a finished run is measured for drift.
    """
    from finetune.runs import open_run

    found = open_run(run)
    from finetune.diagnosing.diagnose import diagnose as judge

    return judge(found, against, progress)


def load_sweep(path: Path) -> Planned:
    """The sweep in a YAML file, with the configuration of each of its runs; ConfigError with every problem of all of them."""
    from finetune.config.sweep import load_sweep as load

    return load(path)


def sweep(planned: Planned, tell: Tell = lambda *_: None) -> tuple[Table, Path | None]:
    """Train and measure what is not there yet of ``planned``; the table of all runs, and the page that compares them."""
    from finetune.sweeping.carry_out import carry_out
    from finetune.sweeping.table import finished_runs, require_figures, write_table

    table = write_table(planned, carry_out(planned, tell, check=lambda outcome: require_figures(planned, outcome)))
    runs = finished_runs(table)
    return table, report(*runs, page=planned.directory / "report.html") if runs else None


def inventory() -> Inventory:
    """What this machine has, and what each part that is missing would give."""
    with loading():
        from finetune.inventory import take_inventory

    return take_inventory()


def stored_results(run: Path) -> Results | None:
    """What the last evaluation of ``run`` found; None where there was none."""
    from finetune.runs import open_run

    found = open_run(run)
    from finetune.evaluation.results import read_results

    return read_results(found)


def named_results(run: Path) -> dict[str, Results]:
    """What evaluations with a configuration of their own found (`finetune eval --config`), by their file in the run's eval/."""
    from finetune.runs import open_run

    found = open_run(run)
    from finetune.evaluation.results import RESULTS, read_results

    names = sorted(path.name for path in found.evaluations.glob("*.json") if path.name != RESULTS)
    return {name: results for name in names if (results := read_results(found, name))}


def places(run: Path) -> dict[str, Path]:
    """Where the parts of a run lie, those that exist."""
    from finetune.runs import open_run
    from finetune.sealed import read_json

    found = open_run(run)
    merge_record = found.path / "merge.json"
    merged = {"merged model": Path(read_json(merge_record)["destination"])} if merge_record.is_file() else {}
    parts = {"run": found.path, "adapter": found.adapter, "model": found.model, **merged}
    return {name: path for name, path in parts.items() if path.exists()}


def report(*runs: Path, page: Path | None = None) -> Path:
    """Write one page of all ``runs`` from their files; returns its path: ``page``, or report.html in the run where there is one."""
    from finetune.reporting.html import write_report
    from finetune.runs import open_run

    return write_report([open_run(run) for run in runs], page)


def require_png(directory: Path) -> None:
    """HardwareError or ConfigError where `report_png` could not write into ``directory``."""
    from finetune.reporting.png import require_png as require

    require(directory)


def report_png(*runs: Path, directory: Path) -> list[Path]:
    """Write the curves of ``runs``, overlaid, as DIRECTORY/NAME.png; returns their paths. Needs the extra `png`."""
    from finetune.reporting.png import write_png
    from finetune.runs import open_run

    return write_png([open_run(run) for run in runs], directory)
