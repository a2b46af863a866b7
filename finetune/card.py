"""Model cards: README.md of an adapter, a merged model or an export, with the metadata that model hubs read.

Only what is known is stated. The license is the one the base's own card names, or none; datasets are listed in the metadata where they are
the hub's, and local files by their last name alone, since a card is published and paths are private. Text that comes from data or
configuration is shown as code, so that none of it becomes markup (pitfall C10).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune import __version__
from finetune.config.dump import dump_config
from finetune.config.schema import Bitfit, Config, Full, Houlsby, HubSource, Icd10cm, NoQuantization
from finetune.errors import ConfigError
from finetune.model.builtin import HUB_ID, public_name

Relation = Literal["adapter", "finetune", "quantized"]

_KNOWN_LICENSES = {HUB_ID: "apache-2.0"}
"""Of the embedded model, whose package carries no card."""
_LICENSE_KEYS = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REPRODUCED = frozenset({"quantization", "tuning", "optimizer", "schedule", "train", "seed"})
"""Sections of the configuration that a card repeats: they hold no path and no text of the data."""
_UNSAFE = re.compile(r"[\s\x00-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card is about."""

    relation: Relation
    summary: str
    """A sentence in Markdown; text from elsewhere in it has gone through `code`."""
    figures: Mapping[str, str]
    """Name -> value with its unit."""
    use: str
    """Python that loads the directory."""
    commands: tuple[str, ...]
    """Shell lines that reproduce it, from a config.yaml."""
    notes: tuple[str, ...] = ()
    """Paragraphs in Markdown."""
    losses: Mapping[str, float] | None = None
    """Figures for the hub's model-index, by metric."""


def card(config: Config, base: Path, subject: Subject) -> str:
    """The README.md of ``subject``, made by the run of ``config`` from the base in the directory ``base``."""
    from huggingface_hub import ModelCard

    title = code(Path(config.output).name)
    lines = [
        f"---\n{_metadata(config, base, subject).to_yaml()}\n---\n",
        f"# {title}\n",
        f"{subject.summary}\n",
        *[f"{note}\n" for note in subject.notes],
        "## Figures\n",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in subject.figures.items())]) + "\n",
        "## Trained on\n",
        "\n".join(f"- {_shown_source(source)}" for source in config.data.train) + "\n",
        "## Use\n",
        f"{_fenced(subject.use, 'python')}\n",
        "## Reproduce\n",
        f"Made with `finetune` {__version__}. `config.yaml` is the run's own; the parts of it that hold no path:\n",
        f"{_fenced(_shown_config(config), 'yaml')}\n",
        f"{_fenced(chr(10).join(subject.commands), 'sh')}\n",
        "## License\n",
        _shown_license(config, base) + "\n",
    ]
    text = "\n".join(lines)
    ModelCard(text)  # what the hub's own library cannot read is not written
    return text


def base_license(base: Path, model_id: str) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the card of the base states them; empty where it has none.

    ConfigError where the card's metadata cannot be read.
    """
    import yaml
    from huggingface_hub import metadata_load

    path = base / "README.md"
    if not path.is_file():
        known = _KNOWN_LICENSES.get(public_name(model_id))
        return {"license": known} if known else {}
    try:
        found = metadata_load(path) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read the metadata of the base's card: {error}", where=str(path), fix="correct or remove it") from error
    return {key: str(found[key]) for key in _LICENSE_KEYS if isinstance(found.get(key), str) and found[key].strip()}


def code(text: str) -> str:
    """``text`` as a Markdown code span on one line, in which nothing is markup or HTML."""
    plain = _UNSAFE.sub(" ", text).strip() or "(empty)"
    fence = "`" * (_longest_ticks(plain) + 1)
    # in a cell of a table a bar ends the cell even in a code span
    plain = plain.replace("|", "\u00a6")
    return f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}"


def nats(loss: float | None) -> str:
    """A loss with its unit, or that there is none."""
    return "not measured" if loss is None else f"{loss:.4f} nats a supervised token"


def use_model() -> str:
    """Python that loads a whole model."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")'
    )


def use_adapter(config: Config, dtype: str, quantization: Mapping[str, object] | None) -> str:
    """Python that loads an adapter with PEFT on its base, in ``dtype`` and with bitsandbytes' settings."""
    keys = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    kept = {key: value for key, value in (quantization or {}).items() if key in keys and value not in (False, None)}
    if not kept.get("load_in_4bit"):
        kept = {key: value for key, value in kept.items() if not key.startswith("bnb_4bit")}
    four_bit = f", quantization_config=BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in kept.items())})" if kept else ""
    imported = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if kept else "")
    name = json.dumps(_hub_base(config) or Path(config.model.id).name)
    return (
        f"from peft import PeftModel\nfrom transformers import {imported}\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="{dtype}"{four_bit})\n'
        'model = PeftModel.from_pretrained(base, "DIR")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")'
    )


def library_of(config: Config) -> str:
    """What loads the run's own result."""
    libraries: dict[type, str] = {Full: "transformers", Bitfit: "finetune", Houlsby: "finetune"}
    return libraries.get(type(config.tuning), "peft")


def shown_base(config: Config) -> str:
    """The base by its public name; a local directory by its last name."""
    return code(_hub_base(config) or Path(config.model.id).name)


def shown_quantization(config: Config) -> str:
    """How the base was quantized, after "a base"."""
    return "that was not quantized" if isinstance(config.quantization, NoQuantization) else f"quantized as `{config.quantization.method}`"


def _metadata(config: Config, base: Path, subject: Subject) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    hub_base = _hub_base(config)
    datasets = sorted({source.source.removeprefix("hub:") for source in config.data.train if isinstance(source, HubSource)})
    results = None
    if subject.losses and len(datasets) == 1 and len(config.data.train) == 1:
        # the hub's index wants the dataset by its id: figures on local rows stand in the text alone
        results = [
            EvalResult(
                task_type="text-generation", dataset_type=datasets[0], dataset_name=datasets[0], metric_type=metric, metric_value=value
            )
            for metric, value in subject.losses.items()
        ]
    fields: dict[str, Any] = {
        "base_model": hub_base,
        "base_model_relation": subject.relation if hub_base else None,
        "library_name": library_of(config) if subject.relation == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune", config.tuning.method, *(["lora"] if config.tuning.method == "tied-lora" else [])],
        "datasets": datasets or None,
        "model_name": Path(config.output).name if results else None,
        "eval_results": results,
        **base_license(base, config.model.id),
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


def _hub_base(config: Config) -> str | None:
    """The base's id on the hub; None for a local directory."""
    name = public_name(config.model.id)
    return name if _HUB_ID.fullmatch(name) and not Path(config.model.id).expanduser().is_dir() else None


def _shown_source(source: Any) -> str:
    match source:
        case HubSource():
            return f"{code(source.source.removeprefix('hub:'))} of the Hugging Face hub, revision `{source.revision}`"
        case Icd10cm():
            return f"{code(source.source)}: ICD-10-CM, seed {source.seed}"
        case _:
            return f"{code(Path(source.source).name)}, a local file"


def _shown_config(config: Config) -> str:
    kept, key = [], ""
    for line in dump_config(config).splitlines():
        key = key if line.startswith((" ", "-", "}", "]")) else line.partition(":")[0]
        if key in _REPRODUCED:
            kept.append(line)
    return "\n".join(kept)


def _shown_license(config: Config, base: Path) -> str:
    found = base_license(base, config.model.id)
    if not found:
        return "The base's own files do not state a license: look it up before these weights are shared."
    stated = ", ".join(f"{key.replace('_', ' ')} {code(value)}" for key, value in found.items())
    return f"As the base: {stated}."


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_ticks(text: str) -> int:
    runs: Iterable[str] = re.findall(r"`+", text)
    return max(map(len, runs), default=0)
