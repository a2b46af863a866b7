"""Changes of a configuration as overrides that are valid for it, whatever its method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from finetune.config.optimizer_checks import LARGEST_LEARNING_RATE
from finetune.config.schema import AdaLora, Config, Full, Houlsby, Lora, Prefix, Prompt, TiedLora, Vera

_LARGEST_RANK = 4096
_LEAST_RANK = 16
"""The usual rank for instructions; below it an adapter is one for style."""
_LARGEST_SCALE = 4.0
"""Of alpha over rank that a larger adapter keeps: recipes use 1 or 2, and what is far above them was hardly meant."""
_USUAL_SCALE = 2.0
_DROPOUT = 0.1
_WEIGHT_DECAY = 0.05
"""Of small data: QLoRA and LoRA use 0.05 to 0.1 of the former, style recipes 0.05 to 0.1 of the latter."""

Overrides = tuple[str, ...]


def rate(config: Config, factor: float) -> Overrides:
    """All learning rates times ``factor``, or what is left of it below the largest rate that the schema allows."""
    optimizer = config.optimizer
    absolute = {name: group.learning_rate for name, group in optimizer.groups.items() if group.learning_rate is not None}
    ratios = [group.lr_ratio or 1.0 for name, group in optimizer.groups.items() if name not in absolute]
    peaks = [optimizer.learning_rate * max([1.0, *ratios]) * optimizer.lora_plus_ratio, *absolute.values()]
    factor = min(factor, LARGEST_LEARNING_RATE / max(peaks))
    named = [(f"{path}.learning_rate", value) for name, value in absolute.items() if (path := group_path(name))]
    return tuple(f"{path}={_short(value * factor)}" for path, value in [("optimizer.learning_rate", optimizer.learning_rate), *named])


def group_path(name: str) -> str | None:
    """The dotted path of an entry of `optimizer.groups`; None for a pattern that an override cannot name."""
    if '"' in name or "=" in name:  # a value begins at the first `=`, also of a lookahead
        return None
    quoted = name.isdecimal() or any(character in name for character in ". \\")
    return f'optimizer.groups."{name}"' if quoted else f"optimizer.groups.{name}"


def warm_up(config: Config) -> Overrides:
    """A tenth of the steps as warm-up, where it was shorter and is stated as a share."""
    schedule = config.schedule
    return ("schedule.warmup_ratio=0.1",) if schedule.warmup_steps is None and (schedule.warmup_ratio or 0.03) < 0.1 else ()


def capacity(config: Config, times: int) -> Overrides:
    """An adapter that is ``times`` as large, with the scale it had unless that is absurd; nothing where size is not a choice."""
    tuning = config.tuning
    match tuning:
        case Lora() | TiedLora() | AdaLora():
            rank = min(_LARGEST_RANK, max(tuning.rank * times, _LEAST_RANK))
            grown = rank / tuning.rank
            root = isinstance(tuning, Lora | TiedLora) and tuning.scaling == "rslora"
            alpha = tuning.alpha * (math.sqrt(grown) if root else grown)
            if not root and tuning.alpha > _LARGEST_SCALE * tuning.rank:
                alpha = _USUAL_SCALE * rank
            free = ("tuning.init_rank=null",) if isinstance(tuning, AdaLora) and tuning.init_rank is not None else ()
            return (f"tuning.rank={rank}", f"tuning.alpha={_short(alpha)}", *free)
        case Vera():
            return (f"tuning.rank={min(_LARGEST_RANK, tuning.rank * times)}",)
        case Houlsby():
            return (f"tuning.bottleneck={min(_LARGEST_RANK, tuning.bottleneck * times)}",)
        case Prompt() | Prefix():
            return (f"tuning.tokens={min(1024, tuning.tokens * times)}",)
    return ()


def regularization(config: Config) -> Overrides:
    """Dropout and weight decay for small data, where they are lower. Decay pulls whole weights to zero, so full tuning keeps its own."""
    found = []
    dropout = getattr(config.tuning, "dropout", None)
    if dropout is not None and dropout < _DROPOUT:
        found.append(f"tuning.dropout={_DROPOUT}")
    if config.optimizer.weight_decay < _WEIGHT_DECAY and not isinstance(config.tuning, Full):
        found.append(f"optimizer.weight_decay={_WEIGHT_DECAY}")
    return tuple(found)


def length(config: Config, steps: int, per_epoch: int) -> Overrides:
    """A run of about ``steps``: in whole passes over the data, or in steps where `train.max_steps` counts them."""
    passes = max(1, -(-steps // per_epoch))
    if config.train.max_steps is None:
        return (f"train.epochs={passes}",)
    room = (f"train.epochs={passes}",) if passes > config.train.epochs else ()
    warmup = config.schedule.warmup_steps
    warm = (f"schedule.warmup_steps={steps // 10}",) if warmup is not None and warmup >= steps else ()
    return (f"train.max_steps={steps}", *room, *warm)


def more_rows(config: Config, source: str) -> Overrides:
    """``source``, a path, beside the sources that are trained on."""
    sources = [one.model_dump(mode="json", exclude_defaults=True) for one in config.data.train]
    first = config.data.train[0].model_dump(mode="json", exclude_defaults=True)
    alike = {key: first[key] for key in ("format", "columns") if key in first}
    return (f"data.train={json.dumps([*sources, {'source': source, **alike}])}",)


def joined(*parts: Iterable[str]) -> Overrides:
    """All overrides, each once."""
    return tuple(dict.fromkeys(override for part in parts for override in part))


def _short(value: float) -> str:
    """``value`` with three digits, in a form that YAML 1.2 reads as a number."""
    return repr(float(f"{value:.3g}"))
