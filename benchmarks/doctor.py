"""Runs made to fail each way, and healthy ones, diagnosed by `finetune doctor`: a confusion table.

Run with `make bench-doctor`; writes docs/benchmarks/doctor.json and prints the table for the lab log. Most runs train a 2-layer Llama
of 64 dimensions on question and answer rows made here; with --real a few train the real SmolLM2 on ICD-10-CM facts (minutes each).
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import api
from finetune.errors import DivergedError
from finetune.reporting.doctor import Diagnosis

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "doctor.json"
NOTHING = "nothing"

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A run and the rules that must find something; others that may are tolerated, and shown."""

    name: str
    overrides: Settings
    expected: tuple[str, ...] = ()
    rows: str = "learnable"
    also: tuple[str, ...] = ()
    """Rules whose finding is right too."""
    against: str | None = None
    real: bool = False
    evaluated: Settings | None = None


# --- rows ----------------------------------------------------------------------------------------------------------------------------

_ANSWERS = ("otitis", "angina", "gout", "asthma", "rickets", "anemia", "measles", "mumps", "scabies", "colitis", "sepsis", "tetanus")
_TERMS = ("alba", "beta", "cedar", "delta", "ember", "fjord", "gamma", "heron", "igloo", "jolly", "karma", "lemon")
_WORDINGS = (
    "What is {}?",
    "Name {}.",
    "{} is called",
    "Please say what {} is.",
    "Tell me about {}.",
    "{}?",
    "How do doctors call {}?",
    "The title of {}:",
    "Which disease is {}?",
    "Say {} in one word.",
    "{}, officially?",
    "What do we write for {}?",
    "Another name of {}?",
    "Code {}.",
    "Translate {}.",
    "Look up {}.",
)


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def learnable(answers: tuple[str, ...] = _ANSWERS) -> Iterator[dict[str, Any]]:
    """Twelve facts in sixteen wordings: what holds for one wording holds for the others."""
    for wording in _WORDINGS:
        for term, answer in zip(_TERMS, answers, strict=True):
            yield _chat(wording.format(term), f"It is {answer}.")


def unlearnable(count: int = 200) -> Iterator[dict[str, Any]]:
    """Answers at random: nothing that holds for one row holds for another."""
    draw = random.Random(0)
    for number in range(count):
        yield _chat(f"Row {number}?", f"It is {draw.choice(_ANSWERS)} and {draw.choice(_ANSWERS)}.")


def many_facts(seed: int = 1) -> Iterator[dict[str, Any]]:
    """Sixty facts of random letters, each in four wordings: they must be held one by one, and there is no style to learn."""
    draw = random.Random(seed)
    facts = {"".join(draw.choices(string.ascii_lowercase, k=4)): "".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(60)}
    for wording in _WORDINGS[:4]:
        for term, answer in facts.items():
            yield _chat(wording.format(term), answer)


def uneven() -> Iterator[dict[str, Any]]:
    """Easy rows and impossible ones in turn, so that the loss is that of the row that was drawn."""
    for easy, hard in zip(learnable(), unlearnable(), strict=False):
        yield easy
        yield hard


def long_answers() -> Iterator[dict[str, Any]]:
    """A third of the rows longer than the rest."""
    for number, row in enumerate(learnable()):
        answer = row["messages"][1]["content"]
        yield _chat(row["messages"][0]["content"], answer * (1 if number % 3 else 12))


def long_questions() -> Iterator[dict[str, Any]]:
    """Long questions with answers of a letter."""
    for number, row in enumerate(learnable()):
        yield _chat(f"{row['messages'][0]['content']} " * 10, "yn"[number % 2])


ROWS = {
    "learnable": learnable,
    "unlearnable": unlearnable,
    "many facts": many_facts,
    "uneven": uneven,
    "long answers": long_answers,
    "long questions": long_questions,
    "before": lambda: [*learnable(_TERMS[5:] + _TERMS[:5]), *unlearnable(), *long_questions(), *many_facts(2)],
    "other answers": lambda: learnable(_ANSWERS[6:] + _ANSWERS[:6]),
}

# --- cases ---------------------------------------------------------------------------------------------------------------------------

_LONG = {"train.epochs": 40, "train.batch_size": 16, "train.evaluate": {"every_steps": 55}}
CASES = (
    Case("rank 1 at a tiny rate", {"tuning.rank": 1, "tuning.alpha": 1, "optimizer.learning_rate": 1e-6}, ("flat-loss",)),
    Case("a rate of a thousandth", {"optimizer.learning_rate": 5e-6}, ("flat-loss",)),
    Case("rate as high as the schema allows, scale 64", {"optimizer.learning_rate": 0.05, "tuning.alpha": 512}, ("rate-too-high",)),
    Case("the same without clipping or warm-up", {"optimizer.learning_rate": 0.05, "tuning.alpha": 4096, "train.max_grad_norm": None,
         "schedule.warmup_ratio": 0.0}, ("rate-too-high",)),
    Case("200 random rows for 40 epochs without dropout", {**_LONG, "tuning.rank": 32, "tuning.alpha": 32}, ("overfitting",), "unlearnable",
         also=("weak-regularization",)),
    Case("the same, two seeds on", {**_LONG, "tuning.rank": 32, "tuning.alpha": 32, "seed": 2}, ("overfitting",), "unlearnable",
         also=("weak-regularization",)),
    Case("two epochs at a tenth of the rate", {"train.epochs": 2, "optimizer.learning_rate": 0.0005}, ("underfitting",)),
    Case("attention alone, 60 facts", {"tuning.targets": "attention", "tuning.rank": 2, "tuning.alpha": 4, "train.epochs": 16,
         "optimizer.learning_rate": 0.02}, ("wrong-layers",), "many facts", also=("saturated-adapter",)),
    Case("rank 1 in one matrix, 60 facts", {"tuning.targets": ["down_proj"], "tuning.rank": 1, "tuning.alpha": 2, "train.epochs": 16,
         "optimizer.learning_rate": 0.02},
         ("saturated-adapter",), "many facts"),
    Case("batches of one row, easy and impossible in turn", {"train.batch_size": 1, "train.epochs": 1}, ("noisy-batch",), "uneven",
         also=("underfitting",)),
    Case("rows cut off", {"data.max_tokens": 64, "data.overlong": "truncate"}, ("over-long-rows",), "long answers"),
    Case("rows dropped", {"data.max_tokens": 64, "data.overlong": "drop"}, ("over-long-rows",), "long answers"),
    Case("answers of a letter", {"data.max_tokens": 1024}, ("few-supervised-tokens",), "long questions"),
    Case("attention at a thousandth of the rate", {"optimizer.groups": {"attention": {"lr_ratio": 0.001}}}, ("dead-groups",)),
    Case("activations recomputed in an empty memory", {"train.gradient_checkpointing": True}, ("unused-memory",)),
    Case("newer rows with other answers", {}, ("drift",), against="other answers"),
)  # fmt: skip
HEALTHY = (
    Case("LoRA, seed 0", {}),
    Case("LoRA, seed 1", {"seed": 1}),
    Case("LoRA, seed 2, newer rows alike", {"seed": 2}, against="learnable"),
    Case("rsLoRA r=16", {"tuning.rank": 16, "tuning.alpha": 8, "tuning.scaling": "rslora", "seed": 3}),
    Case("DoRA with dropout", {"tuning.dora": True, "tuning.dropout": 0.05, "seed": 4}),
    Case("LoRA+", {"optimizer.lora_plus_ratio": 4.0, "optimizer.learning_rate": 0.003, "seed": 5}),
    Case("groups", {"optimizer.groups": {"attention": {"lr_ratio": 0.5}, "mlp": {"lr_ratio": 1.0}}, "seed": 6}),
    Case("AdaLoRA", {"tuning": {"method": "adalora", "rank": 8, "alpha": 16}, "optimizer.learning_rate": 0.02, "seed": 7}),
    Case("full tuning", {"tuning": {"method": "full"}, "optimizer.learning_rate": 0.002, "seed": 8}),
    Case("bottlenecks", {"tuning": {"method": "houlsby", "bottleneck": 32}, "seed": 9}),
    Case("NF4 with LoftQ", {"quantization": {"method": "nf4"}, "tuning.init": {"method": "loftq"}, "seed": 10}),
    Case(
        "tied LoRA, linear schedule", {"tuning": {"method": "tied-lora", "rank": 16, "alpha": 32}, "schedule.method": "linear", "seed": 11}
    ),
)
_FACTS = {"source": "builtin:icd10cm", "document_facts": 8, "question_facts": 8, "control_facts": 12}
REAL = (
    Case("SmolLM2: the quickstart's rate 100 times", {"optimizer.learning_rate": 0.025}, ("rate-too-high",), real=True),
    Case("SmolLM2: attention alone, rank 1, asked", {"tuning.targets": "attention", "tuning.rank": 1, "tuning.alpha": 1,
         "optimizer.groups.attention": None, "optimizer.groups.mlp": None}, ("wrong-layers",), real=True,
         also=("flat-loss", "underfitting"),
         evaluated={"evaluation.tasks": [{"task": "knowledge", "generate": False}]}),
    Case("SmolLM2: ten times the rate, general text measured", {"optimizer.learning_rate": 0.0025}, ("forgetting",), real=True,
         also=("rate-too-high", "overfitting"), evaluated={"evaluation.tasks": [{"task": "forgetting"}]}),
    Case("SmolLM2: the quickstart's settings, general text measured", {}, real=True,
         evaluated={"evaluation.tasks": [{"task": "forgetting"}]}),
)  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """What was found in a case."""

    case: Case
    found: tuple[str, ...]
    diagnosis: Diagnosis
    seconds: float

    @property
    def right(self) -> bool:
        """Whether everything that must be found was, and nothing that must not."""
        return set(self.case.expected) <= set(self.found) <= {*self.case.expected, *self.case.also}


def base_config(folder: Path, case: Case) -> Settings:
    """A run that is healthy on the learnable rows."""
    return {
        "model": {"id": str(folder / "model")},
        "tuning": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "optimizer": {"learning_rate": 0.005, "beta2": 0.99},
        "schedule": {"warmup_ratio": 0.05},
        "data": {"train": [{"source": str(folder / f"{case.rows}.jsonl")}], "validation": {"fraction": 0.15}, "max_tokens": 512},
        "train": {"epochs": 8, "batch_size": 8, "precision": "fp32", "tokens_per_device": 1024},
    }


def run_case(folder: Path, number: int, case: Case) -> Outcome:
    """Train and diagnose ``case``."""
    began, output = time.perf_counter(), folder / f"run-{number}"
    path = folder / f"case-{number}.yaml"
    if case.real:
        path = ROOT / "configs" / "quickstart.yaml"
        overrides = {"data.train": [_FACTS], "data.validation.fraction": 0.15, **case.overrides}
    else:
        path.write_text(json.dumps({**base_config(folder, case), "output": str(output)}))
        overrides = dict(case.overrides)
    given = [f"{key}={json.dumps(value)}" for key, value in {**overrides, "output": str(output)}.items() if key != "tuning"]
    if isinstance(overrides.get("tuning"), dict):  # another method: none of the first one's keys
        path.write_text(json.dumps({**json.loads(path.read_text()), "tuning": overrides["tuning"]}))
    try:
        if not output.exists():
            api.train(api.load_config(path, given).config)
    except DivergedError as error:
        print(f"  {error.problems[0].what}", file=sys.stderr)
    if case.evaluated and not (output / "eval").exists():
        api.evaluate(output, overrides=[f"{key}={json.dumps(value)}" for key, value in case.evaluated.items()])
    diagnosis = api.diagnose(output, folder / f"{case.against}.jsonl" if case.against else None)
    for finding in diagnosis.findings:  # every change is ready: the run's own configuration takes it
        api.load_config(output / "config.yaml", finding.overrides)
    found = tuple(finding.rule for finding in diagnosis.findings)
    return Outcome(case, found, diagnosis, time.perf_counter() - began)


def prepare(folder: Path) -> None:
    """The rows, and the base model: a Llama that knows how answers look, and other facts than the runs teach; a random one is helped by
    every rate."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write_tokenizer(folder / "random")
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    llama = LlamaConfig(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
    LlamaForCausalLM(llama).save_pretrained(folder / "random")
    config = base_config(folder, Case("pretraining", {}, rows="before"))
    config |= {"model": {"id": str(folder / "random")}, "tuning": {"method": "full"}, "output": str(folder / "pretrained")}
    config["optimizer"] = {"learning_rate": 0.005, "beta2": 0.99}
    (folder / "pretraining.yaml").write_text(json.dumps(config))
    api.train(api.load_config(folder / "pretraining.yaml").config)
    (folder / "pretrained" / "model").rename(folder / "model")


def table(outcomes: list[Outcome]) -> str:
    """Expected findings down, what was found across."""
    lines = ["| run | made to show | found | right |", "|---|---|---|---|"]
    for one in outcomes:
        found = ", ".join(one.found) or NOTHING
        lines.append(f"| {one.case.name} | {', '.join(one.case.expected) or NOTHING} | {found} | {'yes' if one.right else '**no**'} |")
    return "\n".join(lines)


def store(outcomes: list[Outcome], folder: Path) -> None:
    """Write what was found so far, with every finding's figures."""
    rows = [
        {
            "run": one.case.name,
            "expected": one.case.expected,
            "also right": one.case.also,
            "found": one.found,
            "right": one.right,
            "findings": one.diagnosis.as_dict()["findings"],
        }
        for one in outcomes
    ]
    RESULTS.write_text(json.dumps({"cases": rows}, indent=1).replace(str(folder), "DIR") + "\n")


def main() -> None:
    """Run the cases and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="also train the real SmolLM2 (minutes)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--keep", type=Path, help="keep the runs in this directory, and use those that are there again")
    given = parser.parse_args()
    cases = [case for case in (*CASES, *HEALTHY, *(REAL if given.real else ())) if given.only in case.name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "model").exists():
            prepare(folder)
        outcomes = []
        for number, case in enumerate(cases):
            outcomes.append(run_case(folder, number, case))
            last = outcomes[-1]
            print(
                f"{'ok   ' if last.right else 'WRONG'} {last.seconds:5.1f} s  {case.name}: {', '.join(last.found) or NOTHING}", flush=True
            )
    print(table(outcomes))
    raise SystemExit(0 if all(one.right for one in outcomes) else 1)


if __name__ == "__main__":
    main()
