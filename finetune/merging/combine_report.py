"""What a combination is and how good it is: for combine.json, and as a model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from finetune.config.combine import Plan
from finetune.config.schema import NoQuantization
from finetune.merging.combine_members import Members
from finetune.merging.combine_write import AdapterReport, ModelReport
from finetune.merging.trials import Trial
from finetune.model.builtin import public_name
from finetune.runs import COMBINED


@dataclass(frozen=True, slots=True)
class Loss:
    """What the combination is worth on rows that none of the adapters was trained on, nats a supervised token."""

    measured_on: str
    base: float
    """Of the weights that training began at."""
    combined: float
    """Of the exact combination in fp32."""
    written: float
    """Of what was written, loaded in a fresh process."""


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What was written, and the proof."""

    destination: Path
    plan: Plan
    formula: str
    """In a line."""
    members: Members
    trials: tuple[Trial, ...]
    """Every type that was tried; the last one is what lies there."""
    loss: Loss | None
    """None where the model is too large to be compared in memory."""
    model: ModelReport | None
    adapter: AdapterReport | None

    @property
    def dtype(self) -> str:
        """Type of the weights that were written."""
        return self.trials[-1].dtype

    @property
    def on_quantized(self) -> bool:
        """Whether the updates lie on a quantized base, or what it dequantizes to, and not on the stored weights."""
        return self.plan.base.weights == "dequantized" and not isinstance(self.members.first.quantization, NoQuantization)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.members.notes

    def as_json(self) -> dict[str, object]:
        """The content of `combine.json`."""
        return {
            "plan": self.plan.model_dump(mode="json"),
            "formula": self.formula,
            "base": self._base(),
            "adapters": [
                {"path": member.name, "weight": member.weight, "sha256": member.sha256, "is_run": member.is_run}
                for member in self.members.members
            ],
            "dtype": self.dtype,
            "loss": asdict(self.loss) if self.loss else None,
            "model": asdict(self.model) if self.model else None,
            "adapter": asdict(self.adapter) if self.adapter else None,
            "trials": [trial.as_json() for trial in self.trials],
            "notes": list(self.notes),
        }

    def _base(self) -> dict[str, object]:
        """What the combination belongs to, as every adapter that was trained here records it (`finetune.runs.recorded_base`)."""
        quantization = self.members.first.quantization if self.on_quantized else NoQuantization()
        original = self.plan.base.weights == "original"
        return {
            "id": self.members.base_id,
            "revision": self.members.revision,
            "fingerprint": self.members.fingerprint,
            "weights": self.plan.base.weights,
            "quantization": quantization.model_dump(mode="json"),
            "dtype": "bf16" if not original and self.members.first.compute_dtype == torch.bfloat16 else "fp32",
            "new_tokens": list(self.members.members[0].new_tokens),
        }


def combination_card(report: CombineReport) -> str:
    """A model card with the metadata that model hubs read."""
    members, plan = report.members, report.plan
    library = "peft" if report.adapter else "transformers"
    entries = "\n".join(
        f"- `{Path(member.name).name}`, weight {member.weight:g}, sha256 {member.sha256[:12]}" for member in members.members
    )
    return f"""---
base_model: {public_name(members.base_id)}
library_name: {library}
tags: [finetune, merge, {plan.method}]
---

# {report.destination.name}

{report.formula.capitalize()} of adapters of `{members.base_id}` ({plan.base.weights} weights), written by `finetune combine`:

{entries}

{_form(report)}
{_measured(report)}
The plan, fingerprints and figures are in `{COMBINED}`.
"""


def _form(report: CombineReport) -> str:
    if report.adapter:
        method = report.members.first.quantization.method
        base = f"the base quantized as `{method}`" if report.on_quantized else "the unquantized base"
        return (
            f"A plain LoRA of rank {report.adapter.rank} (alpha = r) for {base}; cutting it off left a relative error of "
            f"{report.adapter.error:.3g}.\n"
        )
    return f"A whole model in {report.dtype}; plain transformers loads it.\n"


def _measured(report: CombineReport) -> str:
    if report.loss is None:
        return "Rows of every weight were compared with the exact combination.\n"
    loss = report.loss
    return (
        f"Loss on {loss.measured_on}, nats a supervised token: base {loss.base:.4f}, exact combination {loss.combined:.4f}, "
        f"these files {loss.written:.4f}.\n"
    )
