"""One run of one tool, as figures; and the data, template and model that all runs share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.engine import data, measure
from benchmarks.engine.tools import ROOT, Job, Step, Tool, variables

WORK = ROOT / ".cache" / "bench-engine"
TIMEOUT_S = 3600.0
STARTING_SHARE = 0.1
"""Of the steps, that steady state leaves out: the first ones still load code and grow memory."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained, and on what it is judged."""

    model: Path
    files: data.Files
    template: Path
    totals: dict[str, int]
    """Of the training rows."""
    validation: dict[str, int]


def smollm2() -> Path:
    """The converted SmolLM2."""
    from finetune.model.builtin import resolve_model

    return resolve_model("builtin:smollm2-135m")


def prepare_work(rows: int, model: Path | None = None, scale: int = 1) -> Work:
    """Write the rows and the template, count tokens; ``model`` None: SmolLM2. ``scale`` makes rows longer."""
    from transformers import AutoTokenizer

    base = model or smollm2()
    files = data.write(WORK / "data", train=rows, validation=min(rows, data.VALIDATION_ROWS), scale=scale)
    template = WORK / "data" / "template.jinja"
    template.write_text(data.TEMPLATE, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    train, validation = (data.totals(data.encode(path, tokenizer, data.TEMPLATE)) for path in (files.train, files.validation))
    return Work(base, files, template, train, validation)


def steady(steps: Sequence[Step]) -> tuple[float, float]:
    """Tokens a second, and a processor second, from the end of the last starting step to the end of the last one."""
    first = max(1, round(len(steps) * STARTING_SHARE))
    if len(steps) <= first:
        raise ValueError(f"{len(steps)} steps are too few to tell a steady state")
    tokens, begin, end = sum(step.tokens for step in steps[first:]), steps[first - 1], steps[-1]
    return tokens / (end.at_s - begin.at_s), tokens / max(end.cpu_s - begin.cpu_s, 1e-9)


_ROUNDED = 1e-4
"""Of the tokens: a peer whose log holds running totals in four digits tells of one more or less; a row that is left out is more."""


def figures(measured: measure.Measured, steps: Sequence[Step], totals: dict[str, int]) -> dict[str, Any]:
    """Of a run that came to its end; ValueError where it did not do all the work."""
    seen = sum(step.tokens for step in steps)
    if abs(seen - totals["tokens"]) > _ROUNDED * totals["tokens"]:
        raise ValueError(f"the log tells of {seen} tokens, the rows have {totals['tokens']}")
    (rate, cpu_rate), share = steady(steps), totals["supervised_tokens"] / totals["tokens"]
    whole = totals["tokens"] / measured.wall_s
    return {
        "tokens_per_s": round(whole, 2),
        "supervised_tokens_per_s": round(whole * share, 2),
        "steady_tokens_per_s": round(rate, 2),
        "steady_supervised_tokens_per_s": round(rate * share, 2),
        "steady_tokens_per_cpu_s": round(cpu_rate, 2),
        "tokens_per_cpu_s": round(totals["tokens"] / measured.cpu_s, 2),
        "wall_s": round(measured.wall_s, 2),
        "cpu_s": round(measured.cpu_s, 2),
        "first_step_s": round(steps[0].at_s, 2),
        "peak_mib": round(measured.peak_mib, 1),
        "others_load": round(measured.load, 3),
        "rows": totals["rows"],
        "steps": len(steps),
        "last_loss": steps[-1].loss,
    }


def run(tool: Tool, job: Job, work: Work, settings: Sequence[str], *, score: bool = True) -> dict[str, Any]:
    """The figures of one run, or ``failed`` and what the tool said last. What it wrote is deleted."""
    try:
        return _run(tool, job, work, settings, score=score)
    finally:
        shutil.rmtree(job.directory, ignore_errors=True)


def _run(tool: Tool, job: Job, work: Work, settings: Sequence[str], *, score: bool) -> dict[str, Any]:
    job.directory.mkdir(parents=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    identity = {"tool": tool.name, "nf4": job.nf4, "seed": job.seed, "began": began, "settings": list(settings)}
    named, options = variables(settings)
    try:
        measured = measure.run(tool.command(job, options), named | job.environment(), job.directory, TIMEOUT_S, tool.watched(job))
    except OSError as error:
        return identity | {"failed": str(error)}
    if measured.returncode:
        said = [line.text for line in measured.lines[-5:]] + measured.errors.splitlines()[-15:]
        return identity | {"failed": f"exit code {measured.returncode}", "said": said}
    try:
        found = figures(measured, tool.read(measured.lines), work.totals)
        return identity | found | ({"validation_loss": validation_loss(work, tool.adapter(job), nf4=job.nf4)} if score else {})
    except (ValueError, KeyError, subprocess.CalledProcessError) as error:
        return identity | {"failed": f"{type(error).__name__}: {error}", "said": measured.errors.splitlines()[-15:]}


def validation_loss(work: Work, adapter: Path | None, *, nf4: bool) -> float:
    """By score.py, in a process of its own."""
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.engine.score", "--model", work.model, "--template", work.template]
    command += ["--data", work.files.validation, *(["--adapter", adapter] if adapter else []), *(["--nf4"] if nf4 else [])]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["loss"])


def job(work: Work, tool: Tool, *, nf4: bool = False, seed: int = 0, threads: int | None = None) -> Job:
    """One run's place and settings."""
    place = WORK / "runs" / f"{tool.name}{'-nf4' if nf4 else ''}-{os.getpid()}"
    return Job(work.model, work.files.train, work.template, place, seed=seed, nf4=nf4, threads=threads)
