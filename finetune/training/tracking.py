"""The numbers of a run to TensorBoard, Weights & Biases, MLflow and trackio, through accelerate's trackers.

Numbers alone: no settings, texts, paths, command lines or environment, so that neither a secret nor a row of data can leave the machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from finetune.config.credentials import mask
from finetune.config.schema import Config, Tracking
from finetune.errors import ConfigError, HardwareError
from finetune.runs import RunDirectory
from finetune.sealed import read_json, write_json
from finetune.training.metrics import Evaluated, Event, Observer, StepDone, TrackerLost
from finetune.training.records import Start, run_id

_MLFLOW_RUN = "mlflow.json"
"""In the run directory: which run on the server is this one, for the next resumption."""
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
"""What these libraries would tell their makers, or the terminal."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """The run that a tracker is told of."""

    run: RunDirectory
    run_id: str
    from_step: int
    """The first step that is told is the one after it."""
    project: str


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the services; its key under `tracking` is the name of its package and of its extra."""

    make: Callable[[Tracked], Any]
    failures: tuple[str, ...] = ()
    """`module:class` of what it raises besides ImportError, OSError, RuntimeError and ValueError."""

    def errors(self) -> tuple[type[Exception], ...]:
        """What a failure of the service raises; a half-installed one, ImportError."""
        named = (name.split(":") for name in self.failures)
        return (ImportError, OSError, RuntimeError, ValueError, *(getattr(importlib.import_module(module), name) for module, name in named))


def _tensorboard(tracked: Tracked) -> Any:
    # what a killed session wrote of steps that it did not save is dropped
    return TensorBoardTracker("tensorboard", tracked.run.path, purge_step=tracked.from_step + 1)


def _wandb(tracked: Tracked) -> Any:
    settings = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_disable_stats": True,
    }
    return WandBTracker(
        tracked.project, name=tracked.run.path.name, id=tracked.run_id, resume="allow", dir=str(tracked.run.path), settings=settings
    )


def _mlflow(tracked: Tracked) -> Any:
    import mlflow

    place = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        directory = tracked.run.path.absolute() / "mlflow"
        directory.mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{directory / 'mlflow.db'}")
        place = str(directory / "artifacts")
    known = tracked.run.path / _MLFLOW_RUN
    before = str(read_json(known)["run_id"]) if known.is_file() else None
    return MLflowTracker(experiment_name=tracked.project, logging_dir=place, run_id=before, run_name=tracked.run.path.name)


def _trackio(tracked: Tracked) -> Any:
    # a run is known by its name there: a new one must not go on where another of that name ended
    resume = "allow" if tracked.from_step else "never"
    return TrackioTracker(tracked.project, name=tracked.run.path.name, resume=resume, embed=False, auto_log_cpu=False, auto_log_gpu=False)


KINDS: Mapping[str, Kind] = {
    "tensorboard": Kind(_tensorboard),
    "wandb": Kind(_wandb, ("wandb.errors:Error",)),
    "mlflow": Kind(_mlflow, ("mlflow.exceptions:MlflowException",)),
    "trackio": Kind(_trackio, ("httpx:HTTPError",)),
}


def wanted(tracking: Tracking) -> list[str]:
    """Names of the services that are switched on."""
    return [name for name in KINDS if getattr(tracking, name)]


def require_trackers(tracking: Tracking) -> None:
    """HardwareError where a wanted tracker is not installed, ConfigError where nobody is logged in; before anything is built."""
    for name in wanted(tracking):
        if importlib.util.find_spec(name) is None:
            raise HardwareError(
                f"{name} is not installed", where=f"tracking.{name}", fix=f"pip install 'finetune[{name}]', or set it to false"
            )
    if tracking.wandb and not _logged_in():
        raise ConfigError(
            "nobody is logged in to Weights & Biases on this machine",
            where="tracking.wandb",
            fix="run `wandb login` once; or set WANDB_MODE=offline, and upload with `wandb sync` later",
        )


def _logged_in() -> bool:
    """Whether wandb would find a key, which it would ask for in the middle of a run otherwise; the key itself is not looked at."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackers:
    """The services that are told; one that fails is left alone from then on, for a run is worth more than its picture."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._live: dict[str, Any] = {}

    def start(self, tracking: Tracking, tracked: Tracked) -> None:
        """Begin with each of the wanted; HardwareError where one cannot."""
        for name in wanted(tracking):
            with _apart(), _explained(name, tracked.run):
                tracker = KINDS[name].make(tracked)
                tracker.start()
            self._live[name] = tracker
            if name == "mlflow":
                write_json(tracked.run.path / _MLFLOW_RUN, {"run_id": tracker.tracker.info.run_id})

    def tell(self, event: Event) -> None:
        """The observer first, then the services, of steps and evaluations."""
        self._observer(event)
        if isinstance(event, StepDone | Evaluated):
            self._each(lambda tracker: tracker.log(scalars(event), step=event.step))

    def finish(self) -> None:
        """Close all."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self._live.items()):
            try:
                with _apart():
                    act(tracker)
            except KINDS[name].errors() as error:
                del self._live[name]
                self._observer(TrackerLost(name, _reason(error)))


@contextmanager
def trackers(config: Config, start: Start, observer: Observer, accelerator: Any) -> Iterator[Observer]:
    """``observer`` and the wanted services as one observer; the services are closed at the end whatever happens.

    Of several processes, the first alone tells them.
    """
    told = Trackers(observer)
    try:
        if accelerator.is_main_process:
            told.start(config.tracking, Tracked(start.run, run_id(start.run), start.progress.step, config.tracking.project))
        yield told.tell
    finally:
        told.finish()


@contextmanager
def _apart() -> Iterator[None]:
    """Their messages are not results: what they print goes to stderr."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update({name: value for name, value in _QUIET.items() if before[name] is None})
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


@contextmanager
def _explained(name: str, run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except KINDS[name].errors() as error:
        offline = "WANDB_MODE=offline keeps the figures here; " if name == "wandb" else ""
        raise HardwareError(
            f"{name} cannot be started: {_reason(error)}",
            where=f"tracking.{name}",
            fix=f"{offline}without it: finetune train {run.config} --resume -o tracking.{name}=false",
        ) from error


def _reason(error: Exception) -> str:
    """The first line of ``error``, with nothing in it that looks like a secret."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return mask(text)[:300]


def scalars(event: StepDone | Evaluated) -> dict[str, float]:
    """The numbers of one row, rates by group, under names that every service takes."""
    row = asdict(event)
    rates = row.pop("learning_rates", {})
    kind = "train" if isinstance(event, StepDone) else "validation"
    plain = {f"{kind}/{key}": float(value) for key, value in row.items() if key not in ("step", "best")}
    return plain | {f"learning_rate/{name}": rate for name, rate in zip(_plain_names(rates), rates.values(), strict=True)}


def _plain_names(names: Mapping[str, float]) -> list[str]:
    """``(rest), no decay`` -> ``rest_no_decay``: letters, digits, ``_``, ``-`` and ``.``; two that would be equal are numbered."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_") or "group"
        found.append(plain if plain not in found else f"{plain}_{len(found)}")
    return found
