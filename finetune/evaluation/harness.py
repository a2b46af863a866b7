"""Tasks of lm-evaluation-harness on the models that are evaluated here: by name, or from a task file.

The harness asks and marks; what comes back is each item's marks, so that its figures get the same intervals and comparisons as all others.
A figure that does not follow from its items as a mean (a corpus BLEU, a correlation) has no such interval and is left out, aloud.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import HarnessTask
from finetune.data.render import Renderer
from finetune.errors import ConfigError, DataError
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.extras import require
from finetune.evaluation.statistics import Quantity, mean, ratio
from finetune.scoring import Scorer

_NEEDED_BY = "the task harness"
_TOKENS_PER_ITEM = 256
"""Of a batch's tokens, to tell how many items share one: the harness counts items."""
_SAME = 1e-6
"""Relative difference of a figure from the mean of its items that rounding explains."""


def require_tasks(task: HarnessTask) -> None:
    """ConfigError for a task that the harness does not know; HardwareError where the harness is not installed."""
    with _quiet():
        manager = _manager(all(map(_is_file, task.tasks)))
        for name in task.tasks:
            if _is_file(name):
                if not Path(name).is_file():
                    raise ConfigError("there is no such task file", where=name, fix="name a .yaml file, or one of the harness's tasks")
            elif name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                fix = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists its tasks"
                raise ConfigError(f"lm-evaluation-harness has no task {name!r}", where="evaluation.tasks", fix=fix)


def measure(scorer: Scorer, renderer: Renderer, name: str, task: HarnessTask, advance: Callable[[int], None]) -> Measurement:
    """Every figure of ``task`` that is a mean over its items."""
    found = run(scorer, renderer, task, advance)
    quantities: list[Quantity] = []
    for one, samples in found["samples"].items():
        group = one if task.name is None else f"{name}, {one}"
        better = found["higher_is_better"].get(one, {})
        quantities += _quantities(group, samples, found["results"][one], better)
    if not quantities:
        raise DataError("no figure of these tasks is a mean over items", where=", ".join(task.tasks), fix="choose other tasks")
    return Measurement(tuple(quantities))


def run(scorer: Scorer, renderer: Renderer, task: HarnessTask, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """What the harness itself returns: results, and samples by task."""
    if task.style == "chat" and not renderer.tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template", where="evaluation.tasks: harness", fix="set `style: text`")
    scorer.model.eval()
    with _quiet():
        manager = _manager(all(map(_is_file, task.tasks)))
        model = _model(scorer, renderer, advance)
        with _explained(task), torch.no_grad():
            found: dict[str, Any] = require("lm_eval", _NEEDED_BY).simple_evaluate(
                model=model,
                tasks=[_definition(one) for one in task.tasks],
                num_fewshot=task.few_shot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=task.style == "chat",
                task_manager=manager,
            )
    return found


@contextmanager
def _explained(task: HarnessTask) -> Iterator[None]:
    """What comes of data that is not on this machine, as an error that a user can act on."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"lm-evaluation-harness cannot run the task: {type(error).__name__}: {error}",
            where=", ".join(task.tasks),
            fix="its data must be in the hub's cache (download it with network), or in files that a task file names",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, which speaks of what a user of this program did not do."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@lru_cache(maxsize=2)
def _manager(only_files: bool) -> Any:
    """The index of the harness's own tasks takes seconds to read: only where one is named."""
    return require("lm_eval.tasks", _NEEDED_BY).TaskManager(include_defaults=not only_files)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _definition(name: str) -> Any:
    """A task's name, or what its file says. A file may name Python functions beside it, which the harness imports: it is the user's own."""
    return require("lm_eval.tasks._yaml_loader", _NEEDED_BY).load_yaml(name, resolve_func=True) if _is_file(name) else name


def _model(scorer: Scorer, renderer: Renderer, advance: Callable[[int], None]) -> Any:
    """The model as the harness wants it: in the type that it is measured in, telling of progress instead of drawing bars."""
    harness_model = require("lm_eval.models.huggingface", _NEEDED_BY).HFLM

    class Model(harness_model):  # type: ignore[misc, valid-type]
        def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **settings: Any) -> Any:
            del disable_tqdm
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True, **settings)
            advance(len(requests))
            return found

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            del disable_tqdm
            found = super().generate_until(requests, disable_tqdm=True)
            advance(len(requests))
            return found

    return Model(
        pretrained=scorer.model,
        tokenizer=renderer.tokenizer,
        batch_size=max(1, scorer.max_tokens // _TOKENS_PER_ITEM),
        mixed_precision_dtype=torch.bfloat16 if scorer.precision == "bf16" else None,
    )


# --- figures -------------------------------------------------------------------------------------------------------------------------


def _quantities(
    group: str, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any], better: Mapping[str, bool | None]
) -> Iterator[Quantity]:
    """Each figure of a task that follows from its items, by metric and filter."""
    for key, value in results.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        items = [sample[metric] for sample in samples if sample.get("filter") == kept and metric in sample]
        name = f"{group}: {metric}" if kept == "none" else f"{group}: {metric} ({kept})"
        aim = {True: "higher", False: "lower"}.get(better.get(metric), "same")  # type: ignore[arg-type]
        for quantity in _readings(name, aim, metric, items):
            if math.isclose(quantity.value, value, rel_tol=_SAME, abs_tol=_SAME):
                yield quantity
                break


def _readings(name: str, aim: str, metric: str, items: Sequence[Any]) -> Iterator[Quantity]:
    """What the figure may be of its items: their mean, or of log-likelihoods (and lengths) a perplexity or bits."""
    rows = range(len(items))
    if items and all(isinstance(item, (bool, int, float)) for item in items):
        unit = "share" if all(0 <= item <= 1 for item in items) else ""
        yield mean(name, unit, aim, [float(item) for item in items], rows)
        yield ratio(name, "", aim, ([-float(item) for item in items], [1.0] * len(items)), rows, "exp")
    elif items and all(isinstance(item, (tuple, list)) and [*map(type, item)] in ([float, int], [float, float]) for item in items):
        lengths = [float(length) for _, length in items]
        nats = [-float(total) for total, _ in items]
        if metric.startswith("bits"):
            yield ratio(name, "bits/byte", aim, ([one / math.log(2) for one in nats], lengths), rows)
        else:
            yield ratio(name, "", aim, (nats, lengths), rows, "exp")
