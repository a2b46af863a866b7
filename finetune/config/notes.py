"""What is worth saying of a valid configuration: what it still needs from the outside, and learning rates that rarely work."""

from __future__ import annotations

import glob
from pathlib import Path

from finetune.config.schema import Config, FileSource, Full, Prefix, Prompt

FULL_RATE = 5e-5
"""Above it full tuning often forgets more than it learns: LoRA's best rate is about ten times that of full tuning."""
PROMPT_RATE = 1e-3
"""Below it virtual tokens hardly move: prompt tuning used 0.3 (2104.08691), prefix tuning 5e-5 only with a reparametrization."""


def missing_sources(config: Config) -> list[str]:
    """One sentence for each data source that is not there (training would fail with exit code 3)."""
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    sources = [source.source for source in (*config.data.train, *validation) if isinstance(source, FileSource)]
    return [f"{source} does not exist yet; training needs it" for source in sources if not _exists(source)]


def unusual_rates(config: Config) -> list[str]:
    """One sentence where `optimizer.learning_rate` is one that the tuning method rarely works with."""
    rate = config.optimizer.learning_rate
    method = config.tuning.method
    match config.tuning:
        case Full() if rate > FULL_RATE:
            return [
                f"optimizer.learning_rate is {_short(rate)}, which is high for `tuning.method: {method}`: whole weights usually train at "
                f"1e-5 to {_short(FULL_RATE)}, and forget more above it"
            ]
        case Prompt() | Prefix() if rate < PROMPT_RATE:
            return [
                f"optimizer.learning_rate is {_short(rate)}, which is low for `tuning.method: {method}`: virtual tokens usually need "
                f"{_short(PROMPT_RATE)} to 0.3 to move at all"
            ]
    return []


def _short(rate: float) -> str:
    """``rate`` as a person writes it: 5e-5."""
    return f"{rate:g}".replace("e-0", "e-")


def _exists(source: str) -> bool:
    if any(character in source for character in "*?["):
        return any(glob.iglob(source, recursive=True))  # noqa: PTH207 - the pattern is absolute
    return Path(source).exists()
