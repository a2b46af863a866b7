"""The model cards of merged models and of exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from finetune.card import Subject, card, nats, shown_base, shown_quantization, use_adapter, use_model
from finetune.config.schema import Config, NoQuantization
from finetune.merging.exports import ExportReport
from finetune.merging.merge import MergeReport
from finetune.merging.verify import Parity


def merged_card(config: Config, base: Path, report: MergeReport) -> str:
    """README.md of a merged model; ``base`` is the directory of the base model."""
    options = f" --base {report.base}" if report.base != "dequantized" else ""
    seed = report.chosen.seed
    rounding = "" if seed is None else f" --rounding stochastic --seed {seed}"
    subject = Subject(
        relation="finetune",
        summary=f"{_origin(config)}, merged into the weights as {report.dtype} onto {report.why_base}.",
        figures=_figures(report.parity, "this model"),
        use=use_model(),
        commands=("finetune train config.yaml", f"finetune merge RUN -O DIR --dtype {report.dtype}{rounding}{options}"),
        losses={"loss": round(report.parity.loss_merged, 6)},
    )
    return card(config, base, subject)


def export_card(config: Config, base: Path, report: ExportReport) -> str:
    """README.md of an NF4 model or of a plain adapter; ``base`` is the directory of the base model."""
    return _nf4_card(config, base, report) if report.kind == "nf4" else _adapter_card(config, base, report)


def _nf4_card(config: Config, base: Path, report: ExportReport) -> str:
    plain = isinstance(config.quantization, NoQuantization)
    onto = "its base" if plain else f"the {report.chosen.details['merged_onto']} base"
    subject = Subject(
        relation="quantized",
        summary=f"{_origin(config)}, merged into the weights and quantized again to NF4: every linear layer but the head is in 4 bits.",
        figures=_figures(report.parity, "this model"),
        use=use_model(),
        commands=("finetune train config.yaml", "finetune merge RUN -O DIR --to nf4"),
        notes=(
            f"Merged onto {onto} before it was quantized. Quantization rounds away part of what was learned: what it cost stands below.",
        ),
        losses={"loss": round(report.parity.loss_merged, 6)},
    )
    return card(config, base, subject)


def _adapter_card(config: Config, base: Path, report: ExportReport) -> str:
    details = report.chosen.details
    stated = cast(Mapping[str, object], details["base"])
    quantization = cast(Mapping[str, object] | None, stated["quantization"])
    error = cast(float, details["error"])
    option = " --base original" if quantization is None and not isinstance(config.quantization, NoQuantization) else ""
    exact = "Converted exactly." if not error else f"An approximation: the largest relative error of a module's update is {error:.2g}."
    subject = Subject(
        relation="adapter",
        summary=f"{_origin(config)}, as a plain LoRA of rank {details['rank']} and scale 1 on every module, for serving engines. {exact}",
        figures=_figures(report.parity, "this adapter"),
        use=use_adapter(config, str(stated["dtype"]), quantization),
        commands=("finetune train config.yaml", f"finetune merge RUN -O DIR --to adapter{option}"),
        notes=(
            f"Its base is {shown_base(config)}, "
            + ("not quantized." if quantization is None else f"quantized as `{config.quantization.method}`, as in training."),
        ),
        losses={"loss": round(report.parity.loss_merged, 6)},
    )
    return card(config, base, subject)


def _origin(config: Config) -> str:
    return f"Tuned from {shown_base(config)} with `finetune`: {config.tuning.method} on a base {shown_quantization(config)}"


def _figures(parity: Parity, name: str) -> dict[str, str]:
    kept = "not told: training gained too little" if parity.gain_kept is None else f"{parity.gain_kept:.1%}"
    few = ": so few that these shares are noise" if parity.is_few else ""
    return {
        "Validation loss before training": nats(parity.loss_base),
        "Validation loss of the adapter as it was trained": nats(parity.loss_adapter),
        f"Validation loss of {name}": nats(parity.loss_merged),
        "Share of the gain that is kept": kept,
        "Mean KL to the adapter as it was trained": f"{parity.mean_kl:.2g} nats a token, over {parity.positions} positions{few}",
        "Same most likely token": f"{parity.argmax_agreement:.2%}",
        "Largest difference of a logit": f"{parity.max_logit_difference:.3g}",
    }
