"""Runs as their files tell them, written here: a report reads nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.runs import RunDirectory

HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
"""What a row, a model or a name may hold."""
CLOSING = f"</script>{HOSTILE}"

Rows = list[dict[str, Any]]
GIB = 2**30


def losses(steps: int, hostile: str = "mlp") -> Rows:
    """Rows of metrics.jsonl that can be checked by eye: the loss of step n is 4 / n, its rate n / 1000, its 100 n tokens took n seconds."""
    return [
        {
            "kind": "step",
            "step": n,
            "epoch": n / 4,
            "loss": 4 / n,
            "grad_norm": 1.5,
            "learning_rates": {"attention": n / 1000, hostile: n / 2000},
            "tokens": 100 * n,
            "supervised_tokens": 50 * n,
            "seconds": float(n),
            "input_seconds": n / 10,
            "memory_bytes": GIB + n,
        }
        for n in range(1, steps + 1)
    ]


def figure(name: str, base: float, tuned: float) -> dict[str, Any]:
    """One figure of an evaluation with an interval and a verdict, in the words of `finetune.evaluation.results`."""
    change = {"difference": tuned - base, "low": tuned - base - 0.25, "high": tuned - base + 0.25, "p": 0.01, "verdict": "better"}
    intervals = {"base": [base - 0.125, base + 0.125], "tuned": [tuned - 0.125, tuned + 0.125]}
    values = {"base": base, "tuned": tuned}
    return {
        "task": "loss",
        "name": name,
        "unit": "nats/token",
        "n": 37,
        "values": values,
        "better": "lower",
        "intervals": intervals,
        "changes": {"tuned": change},
    }


MERGE = {
    "destination": "/tmp/merged",
    "dtype": "bf16",
    "reason": "bf16 keeps 99.7% of the validation gain",
    "why_base": "the base as quantization left it",
    "fold": {"tensors": 272, "updated": 210, "size": 3 * GIB},
    "parity": {"positions": 256, "max_logit_difference": 1.5, "mean_kl": 0.0015, "argmax_agreement": 0.992, "gain_kept": 0.997}
    | {"loss_base": 4.2158, "loss_adapter": 0.6353, "loss_merged": 0.6341},
}
FINDING = {
    "rule": "rate-too-high",
    "severity": "problem",
    "what": f"the loss spikes {HOSTILE}",
    "evidence": {"spikes": 7, "largest spike, nats": 2.5},
    "reason": "steps overshoot",
    "overrides": ["optimizer.learning_rate=1e-4"],
}
DOCTOR = {
    "run": "r",
    "state": "finished",
    "steps": 8,
    "planned_steps": 8,
    "findings": [FINDING],
    "ran": ["rate-too-high", "flat-loss"],
    "not_run": {"drift": "no newer data was named"},
    "drift": None,
    "format": 1,
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """(name, steps=8, rate=0.1) -> a finished, evaluated, merged and diagnosed run whose texts are hostile wherever a text can be."""

    def make(name: str = "run", steps: int = 8, rate: float = 0.1) -> RunDirectory:
        return write_run(tmp_path / name, steps, rate)

    return make


def write_run(path: Path, steps: int = 8, rate: float = 0.1) -> RunDirectory:
    """As the fixture `make_run` says, at ``path``."""
    run = RunDirectory(path)
    run.evaluations.mkdir(parents=True)
    run.adapter.mkdir()
    config = {"model": {"id": HOSTILE}, "tuning": {"method": "lora", "rank": 16}, "optimizer": {"learning_rate": rate}, "seed": 0}
    run.config.write_text(json.dumps(config, indent=1))  # JSON is YAML
    origins = {
        "model.id": {"value": HOSTILE, "origin": "my.yaml:3"},
        "optimizer.learning_rate": {"value": rate, "origin": f"override -o optimizer.learning_rate={rate}"},
        "seed": {"value": 0, "origin": "default"},
    }
    environment = {
        "started": "2026-01-02T03:04:05+00:00",
        "seed": 0,
        "machine": {"name": HOSTILE, "devices": 1},
        "versions": {"python": "3"},
    }
    sessions = [{"began": "2026-01-02T03:04:05+00:00", "from_step": 0, "devices": 1, "changes": [], "notes": [HOSTILE]}]
    sessions[0]["failed"] = {"error": "DivergedError", "what": f"the loss is not finite {HOSTILE}"}
    write(run.environment, environment | {"origins": origins, "sessions": sessions})
    data = {"train": {"examples": 32, "tokens": 1000, "supervised": 500}}
    groups = [{"name": HOSTILE, "learning_rate": rate, "weight_decay": 0.01, "parameters": 12345, "tensors": 2}]
    resolved = {"precision": {"value": "bf16", "reason": HOSTILE}}
    foretold = {"memory_bytes_by_part": {"base": GIB, "adapters": GIB // 2}, "speed": {"tokens_per_second": 125.0, "origin": "stated"}}
    foretold |= {"parameters": {"trainable": 12345}, "length": {"tokens": 3600}, "cost": {"seconds": 28.8, "kilowatt_hours": None}}
    plan = {"steps": {"per_epoch": 4, "total": steps, "warmup": 0}, "data": data, "groups": groups, "resolved": resolved}
    write(run.plan, plan | {"plan": foretold})
    evaluations: Rows = [
        {"kind": "evaluation", "step": n, "validation_loss": 2.0 / n, "seconds": 1.0, "best": True} for n in (steps // 2, steps)
    ]
    samples: Rows = [
        {"kind": "sample", "step": n, "samples": [{"prompt": f"What is {HOSTILE}?", "text": f"{HOSTILE} after {n}"}], "seconds": 1.0}
        for n in (0, steps)
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in [*losses(steps, CLOSING), *evaluations, *samples]))
    figures = [figure("validation: loss", 2.0, 1.0), figure(f"{HOSTILE}: loss", 3.0, 2.5)]
    answers = [{"kind": "control", "question": HOSTILE, "expected": "x", "answers": {"base": HOSTILE, "tuned": "y"}}]
    results = {"run": "r", "systems": ["base", "tuned"], "figures": figures, "samples": answers, "seconds": 1.0, "notes": [HOSTILE]}
    write(run.evaluations / "results.json", results)
    write(run.path / "merge.json", MERGE)
    write(run.path / "doctor.json", DOCTOR)
    write(run.adapter / "training.json", {"step": steps, "stopped_early": False})
    return run


def write(path: Path, value: object) -> None:
    """``value`` as JSON."""
    path.write_text(json.dumps(value))
