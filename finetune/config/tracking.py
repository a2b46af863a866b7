"""`tracking`: who else is told the figures of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.config.section import Section


class Tracking(Section):
    """Where the numbers of metrics.jsonl go besides. Nothing else is sent: no settings, no text, no command line."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run directory (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases (extra `wandb`; log in with `wandb login`, or set WANDB_MODE=offline)."""
    mlflow: bool = False
    """Log to the MLflow server of MLFLOW_TRACKING_URI; without one, to a database in the run directory (extra `mlflow`)."""
    trackio: bool = False
    """Log to trackio's database on this machine (extra `trackio`)."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "finetune"
    """What W&B, MLflow and trackio list the run under; the run is called as the last part of `output`."""
