"""Each rule on curves made for it, at both sides of its threshold; and every change it proposes, against the schema."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.report import DataReport, SideReport, SourceReport
from finetune.reporting.doctor import RULES, Diagnosis, Drift, Evidence, Module, changes, diagnose
from finetune.reporting.doctor.evidence import Device, Evaluation, Group, Loss, Step

GIB = 2**30


def settings(**sections: Any) -> dict[str, Any]:
    return {
        "model": {"id": "builtin:smollm2-135m"},
        "tuning": {"method": "lora", "rank": 16, "alpha": 32},
        "data": {"train": [{"source": "/data/rows.jsonl"}], "validation": {"fraction": 0.1}},
        "train": {"epochs": 4, "batch_size": 16},
        "output": "/runs/one",
    } | sections


def falling(count: int = 100, start: float = 3.0, end: float = 1.0, *, pace: float = 5.0, noise: float = 0.03) -> list[float]:
    """An exponential approach: what a run that learns and comes to rest looks like."""
    draw = random.Random(0)
    return [end + (start - end) * math.exp(-pace * n / count) + draw.gauss(0, noise) for n in range(count)]


def steps(losses: list[float], **changes: Any) -> tuple[Step, ...]:
    row = {"grad_norm": 0.5, "rates": {"(rest)": 2e-4}, "tokens": 900, "supervised": 400, "seconds": 1.0}
    row |= {"memory_bytes": 20 * GIB, "input_seconds": 0.01}
    return tuple(Step(step=n, loss=loss, **(row | changes)) for n, loss in enumerate(losses, start=1))


def evidence(losses: list[float] | None = None, config: dict[str, Any] | None = None, **changes: Any) -> Evidence:
    """A healthy run, but for what is given."""
    given = steps(falling() if losses is None else losses)
    source = SourceReport("/data/rows.jsonl", "training", 1.0, 400, 400, 22_000, 10_000)
    healthy = Evidence(
        run="runs/one",
        config=Config.model_validate(config or settings()),
        state="finished",
        failure=None,
        planned_steps=100,
        steps=given,
        evaluations=(Evaluation(25, 1.9), Evaluation(50, 1.4), Evaluation(75, 1.15), Evaluation(100, 1.1)),
        groups=(Group("(rest)", 2e-4),),
        data=DataReport(2048, (source,), SideReport(400, 22_000, 10_000, 20, 50, 90, 99, 100)),
        device=Device("cpu", 24 * GIB),
        tokens_per_device=1024,
        checkpointing=False,
        figures=(figure("general text: loss", 2.5, 2.55), figure("general questions: four-way choice", 0.9, 0.88)),
        modules=(Module("layers.0.q_proj", "attention", 16, 9.0, 0.01), Module("layers.0.up_proj", "mlp", 16, 9.0, 0.02)),
        drift=Drift("/new.jsonl", 50, 50, Loss(1.1, 0.05), Loss(1.12, 0.05), Loss(1.9, 0.1), Loss(1.85, 0.1)),
    )
    return replace(healthy, **changes)


def figure(name: str, base: float, tuned: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "unit": "", "n": 100, "values": {"base": base, "tuned": tuned}, "better": "same", **more}


def found(given: Evidence) -> set[str]:
    return {finding.rule for finding in diagnose(given).findings}


def sources(**counts: int) -> DataReport:
    source = SourceReport("/data/rows.jsonl", "training", 1.0, 1000, 1000, 22_000, 10_000, longest_row=3000, **counts)
    return DataReport(2048, (source,), SideReport(400, 22_000, 10_000))


def supervised(share: float, method: str = "assistant", batch: int = 16) -> Evidence:
    config = settings(train={"epochs": 4, "batch_size": batch})
    config["data"] = config["data"] | {"supervise": method}
    return evidence(config=config, data=DataReport(2048, (), SideReport(400, 100_000, int(100_000 * share))))


def rising(*losses: float) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(25 * number, loss) for number, loss in enumerate(losses, start=1))


def jumping(size: float, times: int, lasting: int = 3) -> list[float]:
    losses = falling()
    for start in range(20, 20 + 15 * times, 15):
        for at in range(start, start + lasting):
            losses[at] += size
    return losses


ATTENTION = settings(tuning={"method": "lora", "targets": "attention"})
OFTEN = settings(train={"epochs": 40, "batch_size": 16})
KNOWLEDGE = (figure("all trained facts: answer loss", 5.0, 3.0), figure("never trained (control): answer loss", 5.0, 3.4))
FULL_RANK = tuple(Module(f"layers.{n}.up_proj", "mlp", 4, 3.8, 0.01) for n in range(4))
STILL = (*(Module(f"layers.{n}.up_proj", "mlp", 4, 3.0, 0.01) for n in range(4)), Module("layers.4.up_proj", "mlp", 4, 0.0, 0.00001))
STUCK = falling(end=1.8, pace=12.0)

RUINED = [
    4.7,
    3.2,
    17.5,
    26.9,
    27.5,
    63.7,
    38.8,
    20.9,
    12.9,
    19.6,
    13.6,
    15.3,
    12.8,
    11.0,
    10.0,
    9.0,
    8.2,
    8.0,
    7.9,
    7.0,
    6.7,
    6.7,
    6.4,
    6.0,
]
"""Of a real run at a constant rate of 0.05: the noise of the steps that broke it hides its rise from their own spread."""

SICK: dict[str, Callable[[], tuple[str, Evidence]]] = {
    "diverged": lambda: ("rate-too-high", evidence(state="failed", failure="DivergedError", steps=steps(falling(5)))),
    "ends above its start": lambda: ("rate-too-high", evidence(falling(start=3.0, end=4.0))),
    "rises on the way": lambda: ("rate-too-high", evidence([*falling(10), *[5.0] * 20, *falling(70)])),
    "ruined at once, and never back": lambda: ("rate-too-high", evidence(RUINED, evaluations=rising(39.4, 13.1, 7.9, 6.2))),
    "jumps": lambda: ("rate-too-high", evidence(jumping(2.0, 4))),
    "does not move": lambda: ("flat-loss", evidence(falling(end=3.0), evaluations=())),
    "creeps": lambda: ("flat-loss", evidence([3.0 - 0.0015 * n for n in range(100)], evaluations=())),
    "falls in a straight line": lambda: ("underfitting", evidence([3.0 - 0.02 * n for n in range(100)], evaluations=())),
    "noise": lambda: ("noisy-batch", evidence(falling(noise=0.6), evaluations=())),
    "validation rises": lambda: ("overfitting", evidence(evaluations=rising(1.5, 1.4, 1.6, 1.9))),
    "by heart": lambda: ("overfitting", evidence(falling(end=0.1), evaluations=rising(0.9, 0.9))),
    "validation does not follow": lambda: ("wrong-layers", evidence(config=ATTENTION, evaluations=rising(2.6, 2.5, 2.5))),
    "attention cannot hold the rows": lambda: (
        "wrong-layers",
        evidence(
            STUCK,
            settings(tuning=ATTENTION["tuning"], train=OFTEN["train"]),
            data=DataReport(2048, (), SideReport(100, 9000, 5000)),
            evaluations=(),
        ),
    ),
    "style alone": lambda: ("wrong-layers", evidence(config=ATTENTION, figures=KNOWLEDGE)),
    "few rows, seen often": lambda: (
        "weak-regularization",
        evidence(config=OFTEN, evaluations=(), data=DataReport(2048, (), SideReport(100, 9000, 5000))),
    ),
    "general text": lambda: ("forgetting", evidence(figures=(figure("general text: loss", 2.5, 3.0),))),
    "general questions": lambda: ("forgetting", evidence(figures=(figure("general questions: four-way choice", 0.9, 0.6),))),
    "drift": lambda: ("drift", evidence(drift=Drift("/n", 99, 99, Loss(1.1, 0.05), Loss(1.9, 0.05), Loss(1.9, 0.1), Loss(1.0, 0.1)))),
    "saturated": lambda: (
        "saturated-adapter",
        evidence(STUCK, OFTEN, modules=FULL_RANK, evaluations=(), data=DataReport(2048, (), SideReport(100, 9000, 5000))),
    ),
    "dead group": lambda: (
        "dead-groups",
        evidence(
            groups=(Group("attention", 2e-7), Group("mlp", 2e-4)),
            config=settings(optimizer={"groups": {"attention": {"lr_ratio": 0.001}, "mlp": {"lr_ratio": 1.0}}}),
        ),
    ),
    "still module": lambda: ("dead-groups", evidence(modules=STILL)),
    "cut off": lambda: ("over-long-rows", evidence(data=sources(truncated=30))),
    "dropped": lambda: ("over-long-rows", evidence(data=sources(dropped=30))),
    "few supervised": lambda: ("few-supervised-tokens", supervised(0.02, batch=4)),
    "last turn alone": lambda: ("few-supervised-tokens", supervised(0.04, "last-turn")),
    "recomputed in vain": lambda: ("unused-memory", evidence(checkpointing=True, steps=steps(falling(), memory_bytes=2 * GIB))),
    "small micro-batches": lambda: ("unused-memory", evidence(device=Device("cuda", 80 * GIB), tokens_per_device=512)),
    "waiting": lambda: ("slow-input", evidence(steps=steps(falling(), input_seconds=0.3))),
}

WELL: dict[str, Callable[[], Evidence]] = {
    "as it should be": evidence,
    "a loss of nearly nothing from the start": lambda: evidence(falling(start=0.1, end=0.1, noise=0.001), evaluations=()),
    "one odd batch now and then": lambda: evidence(jumping(2.0, 4, lasting=1)),
    "an easy batch first, odd ones later": lambda: evidence(
        [0.5 if n in (0, 7, 31) else 3.0 if n % 9 == 3 else loss for n, loss in enumerate(falling(start=1.5))], evaluations=()
    ),
    "a low jump": lambda: evidence(jumping(0.3, 4)),
    "a little of a large loss, and at rest": lambda: evidence(falling(start=3.0, end=2.8), evaluations=()),
    "validation that comes and goes": lambda: evidence(evaluations=rising(1.5, 1.11, 1.10, 1.12)),
    "style on attention": lambda: evidence(falling(start=1.9, end=1.3), ATTENTION, evaluations=rising(1.5, 1.4)),
    "few rows with dropout": lambda: evidence(
        config=OFTEN | {"tuning": {"method": "lora", "dropout": 0.1}},
        data=DataReport(2048, (), SideReport(100, 9000, 5000)),
        evaluations=(),
    ),
    "few rows that generalize": lambda: evidence(config=OFTEN, data=DataReport(2048, (), SideReport(100, 9000, 5000))),
    "full rank, and all learned": lambda: evidence(falling(end=0.3), evaluations=rising(0.4, 0.3), modules=FULL_RANK),
    "one row in a thousand cut off": lambda: evidence(data=sources(truncated=1)),
    "little supervised, but enough a step": lambda: supervised(0.04, batch=64),
    "forgetting that chance explains": lambda: evidence(
        figures=(figure("general text: loss", 2.5, 3.0, changes={"tuned": {"low": -0.1, "high": 1.1}}),)
    ),
    "harder rows, for the base too": lambda: evidence(
        drift=Drift("/n", 99, 99, Loss(1.1, 0.05), Loss(1.9, 0.05), Loss(1.9, 0.1), Loss(2.0, 0.1))
    ),
    "LoRA+": lambda: evidence(
        groups=(Group("mlp", 2e-4), Group("mlp B", 2e-4 * 200)),
        config=settings(optimizer={"groups": {"mlp": {"lr_ratio": 1.0}}, "lora_plus_ratio": 200.0}),
    ),
    "a large memory without need": lambda: evidence(device=Device("cuda", 80 * GIB), tokens_per_device=4096),
}


@pytest.mark.parametrize(("memory", "proposed"), [(80, ("train.gradient_checkpointing=false",)), (10, ())])
def test_more_memory_is_used_only_where_it_holds_the_change(memory: int, proposed: tuple[str, ...]) -> None:
    """The same run with less than half of either device in use: what 16,384 tokens of this model keep takes 6 GiB more."""
    given = evidence(
        checkpointing=True,
        tokens_per_device=16_384,
        device=Device("cuda", memory * GIB),
        steps=steps(falling(), memory_bytes=4 * GIB, tokens=16_384),
        data=DataReport(2048, (), SideReport(400, 200_000, 90_000, 100, 500, 600, 1800, 2000)),
    )
    assert tuple(override for finding in diagnose(given).findings for override in finding.overrides) == proposed


def test_a_model_whose_shapes_are_unknown_gets_no_advice_on_memory() -> None:
    config = settings(model={"id": "nobody/knows-this"})
    assert not found(evidence(config=config, checkpointing=True, steps=steps(falling(), memory_bytes=2 * GIB)))


@pytest.mark.parametrize(
    ("context", "override"), [(None, "data.max_tokens=3008"), (4096, "data.max_tokens=3008"), (2048, "data.overlong=split")]
)
def test_rows_are_never_to_be_longer_than_the_model_reads(context: int | None, override: str) -> None:
    (finding,) = diagnose(evidence(data=sources(truncated=30), context=context)).findings
    assert finding.overrides == (override,)


def test_damage_of_the_curve_is_told() -> None:
    assert diagnose(evidence(unreadable=(7, 9))).notes == (
        "metrics.jsonl is damaged: 2 lines, first 7, are no JSON, and the curve lacks them",
    )
    assert not diagnose(evidence()).notes


@pytest.mark.parametrize("name", SICK)
def test_what_is_wrong_is_found_alone(name: str) -> None:
    rule, given = SICK[name]()
    assert found(given) == {rule}, [(finding.rule, finding.what) for finding in diagnose(given).findings]


@pytest.mark.parametrize("name", WELL)
def test_nothing_is_found_where_all_is_well(name: str) -> None:
    assert not diagnose(WELL[name]()).findings


def test_every_rule_is_shown_to_find_something() -> None:
    assert {rule for rule, _ in (make() for make in SICK.values())} == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", SICK)
def test_a_finding_has_figures_and_a_reason(name: str) -> None:
    (finding,) = diagnose(SICK[name]()[1]).findings
    assert finding.what
    assert finding.reason
    assert finding.evidence
    assert all(isinstance(value, str) or math.isfinite(value) for value in finding.evidence.values())


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "alpha": 7, "targets": "attention", "alpha_pattern": {"layers.0": 4}},
    "rslora, orthogonal": {
        "method": "lora",
        "rank": 2,
        "alpha": 5,
        "scaling": "rslora",
        "init": {"method": "orthogonal"},
        "targets": ["q_proj"],
    },
    "largest rank": {"method": "lora", "rank": 4096, "alpha": 4096, "targets": "attention"},
    "tied": {"method": "tied-lora", "rank": 2, "targets": "attention"},
    "adalora": {"method": "adalora", "rank": 4, "init_rank": 6, "targets": "attention"},
    "vera": {"method": "vera", "rank": 4, "targets": "attention"},
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt", "tokens": 600},
    "prefix": {"method": "prefix"},
    "norm": {"method": "norm"},
    "bitfit": {"method": "bitfit"},
    "houlsby": {"method": "houlsby"},
    "full": {"method": "full"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "limits": {
        "optimizer": {"learning_rate": 0.04},
        "train": {"epochs": 40, "batch_size": 16, "max_steps": 90, "max_grad_norm": None},
        "schedule": {"warmup_steps": 80, "method": "constant"},
    },
    "rates of groups": {
        "optimizer": {"learning_rate": 1e-3, "groups": {"layers\\.0\\.": {"learning_rate": 0.02}, "layers.1": {"lr_ratio": 0.001}}},
        "train": {"epochs": 40, "batch_size": 16, "early_stopping": {"patience": 5}},
    },
    "no validation, two sources": {
        "data": {
            "train": [
                {"source": "builtin:icd10cm"},
                {"source": "/data/b.csv", "columns": {"question": "Frage"}, "format": "question-answer"},
            ],
            "max_tokens": 512,
            "supervise": "last-turn",
            "overlong": "truncate",
        }
    },
}


PAIRS = [*((method, "as they are") for method in METHODS), *((method, other) for method in ("lora", "ia3", "full") for other in OTHERS)]


@pytest.mark.parametrize(("method", "other"), dict.fromkeys(PAIRS))
def test_every_change_is_valid_for_the_run_it_is_proposed_for(method: str, other: str, tmp_path: Path) -> None:
    config = settings(tuning=METHODS[method]) | OTHERS[other]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    load_config(path)
    proposed = 0
    for _, given in (make() for make in SICK.values()):
        loaded = load_config(path).config
        sick = replace(given, config=loaded, groups=_groups(loaded) if len(given.groups) > 1 else given.groups)
        for rule in RULES:
            finding = None if rule.lacks(sick) else rule.find(sick)
            if finding and finding.overrides:
                changed = load_config(path, finding.overrides).config
                assert changed != loaded, (finding.rule, finding.overrides)
                proposed += 1
    assert proposed > 5


def _groups(config: Config) -> tuple[Group, ...]:
    entries = config.optimizer.groups.items()
    rates = [Group(name, group.learning_rate or config.optimizer.learning_rate * (group.lr_ratio or 1.0)) for name, group in entries]
    return (*rates, Group("(rest)", config.optimizer.learning_rate))


def test_a_raised_rate_stays_below_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings(optimizer={"learning_rate": 0.01})))
    flat = replace(evidence(falling(end=3.0), evaluations=()), config=load_config(path).config)
    (finding,) = diagnose(flat).findings
    assert load_config(path, finding.overrides).config.optimizer.learning_rate == 0.05


def test_more_rank_keeps_the_scale(tmp_path: Path) -> None:
    for scaling in ("lora", "rslora"):
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(settings(tuning={"method": "lora", "rank": 2, "alpha": 6, "scaling": scaling})))
        before = load_config(path).config.tuning
        flat = replace(evidence(falling(end=3.0), evaluations=()), config=load_config(path).config)
        after = load_config(path, diagnose(flat).findings[0].overrides).config.tuning
        power = 0.5 if scaling == "rslora" else 1.0
        assert after.rank == 16  # type: ignore[union-attr]
        assert after.alpha / after.rank**power == pytest.approx(before.alpha / before.rank**power, rel=0.01)  # type: ignore[union-attr]


def test_an_absurd_scale_is_not_carried_over(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings(tuning={"method": "lora", "rank": 2, "alpha": 512})))
    assert changes.capacity(load_config(path).config, 4) == ("tuning.rank=16", "tuning.alpha=32.0")


@pytest.mark.parametrize(
    ("curve", "train", "expected"),
    [
        ("underfitting", {"max_steps": 100, "epochs": 4}, ("train.max_steps=200", "train.epochs=8")),
        ("underfitting", {"max_steps": 100, "epochs": 40}, ("train.max_steps=200",)),
        ("underfitting", {"epochs": 4}, ("train.epochs=8",)),
        ("overfitting", {"max_steps": 100, "epochs": 40}, ("train.max_steps=30",)),
        ("overfitting", {"epochs": 4}, ("train.epochs=2",)),
    ],
)
def test_a_run_that_is_counted_in_steps_is_lengthened_and_shortened_in_steps(
    curve: str, train: dict[str, int], expected: tuple[str, ...]
) -> None:
    """In passes over much data, sixty steps more would be thousands."""
    config = settings(train={"batch_size": 16, **train})
    straight = evidence([3.0 - 0.02 * n for n in range(100)], config, evaluations=())
    rose = evidence(config=config, evaluations=(Evaluation(30, 1.2), Evaluation(60, 1.5), Evaluation(100, 1.9)))
    (finding,) = diagnose(straight if curve == "underfitting" else rose).findings
    assert finding.rule == curve
    assert tuple(override for override in finding.overrides if "max_steps" in override or "epochs" in override) == expected


@pytest.mark.parametrize("name", ["7", "layers[.]1", "q_proj|k_proj", "(?=.*attn).*", '.*"x"?.*'])
def test_a_group_is_named_as_an_override_can_or_not_at_all(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings(optimizer={"groups": {name: {"learning_rate": 1e-4}}})))
    overrides = changes.rate(load_config(path).config, 0.1)
    after = load_config(path, overrides).config.optimizer.groups[name].learning_rate
    assert after == pytest.approx(1e-4 if "=" in name or '"' in name else 1e-5)


def test_rules_without_evidence_say_what_they_lack() -> None:
    short = evidence(falling(5), state="unfinished", evaluations=(), figures="it was not evaluated: finetune eval runs/one")
    diagnosis = diagnose(replace(short, modules="the run is not finished: it has no adapter", drift="no newer data was given"))
    assert not diagnosis.findings
    assert set(diagnosis.ran) | set(diagnosis.not_run) == {rule.name for rule in RULES}
    assert not set(diagnosis.ran) & set(diagnosis.not_run)
    assert diagnosis.not_run["forgetting"] == "it was not evaluated: finetune eval runs/one"
    assert "20 steps" in diagnosis.not_run["rate-too-high"]
    assert diagnosis.not_run["drift"] == "no newer data was given"


def test_older_runs_have_neither_memory_nor_waiting() -> None:
    old = evidence(steps=steps(falling(), memory_bytes=None, input_seconds=None))
    assert {"unused-memory", "slow-input"} <= set(diagnose(old).not_run)


def test_problems_come_first_and_json_gives_the_diagnosis_back() -> None:
    several = evidence(falling(end=0.1), OFTEN, evaluations=rising(0.9, 0.9), data=DataReport(2048, (), SideReport(100, 9000, 5000)))
    diagnosis = diagnose(several)
    assert [finding.severity for finding in diagnosis.findings] == ["problem", "advice"]
    assert Diagnosis.from_dict(json.loads(json.dumps(diagnosis.as_dict()))) == diagnosis


def test_the_page_lists_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    listed = [line.split(" | ")[:2] for line in page.split("<!-- rules -->")[1].split("<!-- end of rules -->")[0].strip().splitlines()]
    assert listed == [[f"| `{rule.name}`", rule.looks_for] for rule in RULES]
