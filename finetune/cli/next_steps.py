"""What can be done with a finished run, which depends on what it trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.config.schema import Full, Houlsby, Prefix, Prompt, Tuning

if TYPE_CHECKING:
    from finetune.runs import RunDirectory


def next_steps(run: RunDirectory, tuning: Tuning) -> str:
    """One line: commands that work on ``run``, and how its result is used where it cannot be merged."""
    measure = f"next: finetune eval {run.path}"
    match tuning:
        case Full():
            return f"{measure}; the whole model lies in {run.model}"
        case Prompt() | Prefix():
            return f"{measure}; {tuning.method} cannot be merged: load {run.adapter} with peft.PeftModel.from_pretrained"
        case Houlsby():
            return f"{measure}; {tuning.method} cannot be merged: load {run.adapter} with finetune.model.adapters.load"
        case _:
            return f"{measure}; finetune merge {run.path} -O DIR"
