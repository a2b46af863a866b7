"""What can be analyzed at all, found without loading anything heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune.config.schema import AdaLora, Config, Full, Lora, TiedLora
from finetune.errors import ConfigError
from finetune.runs import RunDirectory


def require_analyzable(runs: Sequence[tuple[RunDirectory, Config]]) -> None:
    """ConfigError: a run is named twice, its method trains no matrix of a module, or it is not finished.

    VerificationError: a file of a result is not the one that was saved.
    """
    twice = [path for path, count in Counter(str(run.path.resolve()) for run, _ in runs).items() if count > 1]
    if twice:
        raise ConfigError("the run is named twice", where=twice[0], fix="name each run once")
    for run, config in runs:
        if not isinstance(config.tuning, Lora | TiedLora | AdaLora | Full):
            raise ConfigError(
                f"tuning.method: {config.tuning.method} leaves no low-rank or whole update of a weight that could be analyzed",
                where=str(run.path),
                fix="analyze runs of lora, tied-lora, adalora or full",
            )
        run.require_finished()


def no_factors(run: RunDirectory, config: Config) -> str | None:
    """Why ``run`` has no low-rank factors to look at; None where it has. The files themselves are checked when they are read."""
    if not isinstance(config.tuning, Lora | TiedLora | AdaLora):
        return f"tuning.method: {config.tuning.method} has no low-rank factors"
    return None if run.is_finished() else "the run is not finished: it has no adapter"


def require_share(share: float) -> None:
    """ConfigError where ``share`` is not in (0, 1]."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"a share of {share:g} of the layers cannot be chosen", where="--share", fix="use a number above 0, up to 1")
