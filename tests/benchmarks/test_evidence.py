"""What is said of the evidence: from files of runs made up here, so that what must be said is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.evidence import page, records
from benchmarks.evidence.__main__ import write
from benchmarks.evidence.claims import best, by_arm, matched, most_learned, verdicts
from benchmarks.evidence.records import FIGURES, Number, Run
from finetune.config.load import Loaded
from finetune.config.sweep import Case, Planned, load_sweep
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.conclusions import ASKED, BINDING, CONTROL, READ, STYLE, SUBSTANCE, TRAINED, contrasts
from finetune.evaluation.items import as_items, write_items
from finetune.evaluation.statistics import mean

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def planned() -> Planned:
    return load_sweep(ROOT / "benchmarks" / "evidence" / "cpu.yaml")


PlannedRun = tuple[Case, Loaded]


def _file(one: PlannedRun, changes: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """A run's file; ``changes``: column -> (difference, half of its interval)."""
    case, loaded = one
    figures, headlines = [], []
    for column, (value, half) in changes.items():
        change = {"difference": value, "low": value - half, "high": value + half, "p": 0.01, "verdict": "-"}
        name, _, measure = FIGURES[column].partition(": ")
        if name in ("substance", "style", "extraction gap"):
            headlines.append({"name": name, "measure": measure, "unit": "", "better": "higher", "system": "tuned", "change": change})
        else:
            values = {"base": 2.5, "tuned": 2.5 + value}
            figures.append({"name": FIGURES[column], "values": values, "changes": {"tuned": change}})
    return {
        "name": case.run.name,
        "arm": case.arm,
        "config": records.configured(loaded.config),
        "failure": None,
        "machine": {"kind": "cpu", "name": "a processor", "bf16": True},
        "versions": {"finetune": "0", "torch": "2"},
        "training": {"tokens": 28_000, "step_seconds": 60.0, "evaluation_seconds": 30.0},
        "systems": ["base", "tuned"],
        "figures": figures,
        "headlines": headlines,
        "notes": [],
        "questions": {"knowledge": {"": "a digest"}},
        "items": {},
    }


def _keep(planned: Planned, docs: Path, numbers: Mapping[str, tuple[Mapping[str, tuple[float, float]], ...]]) -> tuple[Run, ...]:
    """Files for the arms of ``numbers``, one a rate; what is read back for the whole sweep."""
    folder = docs / "runs" / "cpu"
    folder.mkdir(parents=True)
    for arm, changes in numbers.items():
        for one, change in zip([one for one in planned.cases if one[0].arm == arm], changes, strict=True):
            (folder / f"{one[0].run.name}.json").write_text(json.dumps(_file(one, change)))
    return records.read(planned, folder)


def _only(planned: Planned, *cases: PlannedRun) -> Planned:
    return replace(planned, cases=cases)


def _three(*pairs: tuple[float, float]) -> tuple[dict[str, tuple[float, float]], ...]:
    """(learned, forgotten) at three rates, both to within 0.1."""
    return tuple({"learned": (learned, 0.1), "forgotten": (forgotten, 0.1), "style": (-0.5, 0.1)} for learned, forgotten in pairs)


def test_both_sweeps_have_every_arm_at_three_rates_of_the_same_data(planned: Planned) -> None:
    for found in (planned, load_sweep(ROOT / "benchmarks" / "evidence" / "gpu.yaml")):
        arms: dict[str, set[float]] = {}
        for case, loaded in found.cases:
            arms.setdefault(case.arm, set()).add(loaded.config.optimizer.learning_rate)
        assert arms.keys() == page.ARMS.keys()
        assert all(len(rates) == 3 for rates in arms.values())
        assert [10 * rate for rate in sorted(arms["full"])] == pytest.approx(sorted(arms["lora"]))
        same = {loaded.config.data.model_dump_json() for case, loaded in found.cases if case.arm != "shuffled"}
        assert len(same) == len({loaded.config.train.model_dump_json() for _, loaded in found.cases}) == 1
        assert {loaded.config.seed for _, loaded in found.cases} == {0}


def test_differences_of_two_runs_have_the_interval_of_independent_numbers() -> None:
    difference = Number(2.0, 1.7, 2.3).less(Number(1.0, 0.6, 1.4))
    assert (difference.value, difference.low, difference.high) == pytest.approx((1.0, 0.5, 1.5))  # hypot(0.3, 0.4)
    ratio = Number(2.0, 1.7, 2.3).over(Number(0.5, 0.4, 0.6)).times(0.01)
    assert ratio.value == pytest.approx(0.04)
    assert (ratio.high - ratio.value) / ratio.value == pytest.approx((0.15**2 + 0.2**2) ** 0.5)  # relative errors of both
    assert (difference.sign, Number(0, -1, 1).sign, Number(-2, -3, -1).sign) == (1, 0, -1)


def _asked(gain: float, seed: int) -> Measurement:
    """Binding of 14 + 14 trained facts, which gained ``gain``, and 20 that gained nothing; facts differ by far more than systems do."""
    hard = np.random.default_rng(9).normal(0.0, 2.0, 48)
    noise = np.random.default_rng(seed).normal(0.0, 0.1, 48)
    found = hard + noise + np.where(np.arange(48) < 28, gain, 0.0)
    arms = {TRAINED: slice(0, 28), ASKED: slice(0, 14), READ: slice(14, 28), CONTROL: slice(28, 48)}
    codes = np.arange(48)
    kept = [mean(f"{arm}: {BINDING}", "nats/token", "higher", found[part], codes[part]) for arm, part in arms.items()]
    return Measurement((*kept, mean("all trained facts, the code: answer loss", "nats/token", "lower", found[:28], codes[:28])))


def _with_items(one: PlannedRun, gain: float, seed: int) -> dict[str, Any]:
    """A run's file with what its figures were summed from; its base was as good at everything as the others' were."""
    base, tuned = _asked(0.0, 0), _asked(gain, seed)
    learned = contrasts(BINDING, base, tuned)[SUBSTANCE].value
    return _file(one, {"learned": (learned, 0.1)}) | {"items": as_items({"knowledge": {"base": base, "tuned": tuned}})}


def test_runs_that_were_asked_about_the_same_facts_are_compared_fact_by_fact(planned: Planned, tmp_path: Path) -> None:
    ones = planned.cases[:3]
    for one, (gain, seed) in zip(ones, ((1.0, 1), (0.7, 2), (0.7, 2)), strict=True):
        (tmp_path / f"{one[0].run.name}.json").write_text(json.dumps(_with_items(one, gain, seed)))
    path = tmp_path / f"{ones[2][0].run.name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"questions": {"knowledge": {"": "another digest"}}}))
    one, other, third = records.read(_only(planned, *ones), tmp_path)
    assert "other facts" in third.why_not
    difference = one.numbers["learned"].less(other.numbers["learned"])
    # A difference of means over the same facts, the two arms apart: its standard error by the formula for paired samples.
    gaps = {arm: _gaps(arm) for arm in (TRAINED, CONTROL)}
    error = sum(gap.var(ddof=1) / len(gap) for gap in gaps.values()) ** 0.5
    assert difference.value == pytest.approx(gaps[TRAINED].mean() - gaps[CONTROL].mean(), abs=1e-6)
    assert difference.error == pytest.approx(error, rel=0.12)
    assert difference.sign == 1


def test_the_best_of_an_arm_is_chosen_anew_in_every_resample(planned: Planned, tmp_path: Path) -> None:
    ones = [one for one in planned.cases if one[0].arm == "lora"]
    for one, seed in zip(ones, (1, 2, 3), strict=True):
        (tmp_path / f"{one[0].run.name}.json").write_text(json.dumps(_with_items(one, 1.0, seed)))
    runs = records.read(_only(planned, *ones), tmp_path)
    number, top = most_learned(runs), best(runs)
    assert top is not None
    assert number.value == top.numbers["learned"].value
    # three that differ by chance alone: the best of them is above the one that was chosen once and for all
    assert number.sampled is not None
    assert top.numbers["learned"].sampled is not None
    assert number.sampled.draws.mean() > top.numbers["learned"].sampled.draws.mean() + 0.005
    assert top.numbers["learned"].sampled.interval is not None
    assert number.low >= top.numbers["learned"].sampled.interval[0]


def _gaps(arm: str) -> NDArray[np.float64]:
    one, other = (_asked(gain, seed).named(f"{arm}: {BINDING}") for gain, seed in ((1.0, 1), (0.7, 2)))
    assert one is not None
    assert other is not None
    return one.numerators - other.numerators


def test_every_verdict_follows_from_the_numbers(planned: Planned, tmp_path: Path) -> None:
    numbers = {
        "lora": _three((0.5, 0.02), (1.0, 0.1), (2.0, 0.3)),
        "lora-attention": _three((0.2, 0.0), (0.4, 0.0), (0.6, 0.1)),
        "rslora": _three((0.5, 0.0), (1.0, 0.1), (2.1, 0.4)),
        "dora": _three((0.1, 0.0), (0.9, 0.1), (1.0, 0.2)),
        "full": _three((0.5, 0.4), (1.1, 0.5), (2.5, 0.9)),
        "shuffled": _three((0.05, 0.1), (0.0, 0.1), (-0.4, 0.3)),
    }
    found = {one.claim: one.outcome for one in verdicts(by_arm(_keep(planned, tmp_path, numbers)))}
    assert found["LoRA on all linear layers learns more than on attention alone"] == "held"
    assert found["rsLoRA at a high rank learns more than LoRA at rank 16"] == "no difference seen"
    assert found["DoRA learns more than LoRA"] == "the opposite was seen"
    assert found["LoftQ learns more than NF4 without it"] == "not measured"
    assert found["LoRA forgets less than full tuning that learned as much"] == "held"
    assert found["shuffled answers teach no substance, at any rate"] == "none seen"
    assert found["right answers teach more than shuffled ones, at every rate at which right ones teach"] == "held"
    assert found["facts never trained stay at chance"] == "not measured"
    assert found["shuffled answers teach style: answers to facts never trained become likelier"] == "held"


def test_shuffled_answers_that_taught_something_are_told(planned: Planned, tmp_path: Path) -> None:
    runs = _keep(planned, tmp_path, {"shuffled": _three((0.0, 0.1), (0.3, 0.1), (0.0, 0.1))})
    found = {one.claim: one.outcome for one in verdicts(by_arm(runs))}
    assert found["shuffled answers teach no substance, at any rate"] == "the opposite was seen"


def test_what_is_said_of_all_rates_needs_all_of_them(planned: Planned, tmp_path: Path) -> None:
    runs = _keep(planned, tmp_path, {"shuffled": _three((0.0, 0.1), (0.0, 0.1), (0.0, 0.1)), "lora": _three((0.5, 0), (1.0, 0), (2.0, 0))})
    found = {one.claim: one.outcome for one in verdicts(by_arm([run for run in runs if run.rate != 6e-4]))}
    assert found["shuffled answers teach no substance, at any rate"] == "none seen"  # all that the sweep has
    missing = [replace(run, numbers={}) if run.rate == 6e-4 else run for run in runs]
    found = {one.claim: one.outcome for one in verdicts(by_arm(missing))}
    assert {found[claim] for claim in found if "shuffled" in claim} == {"not measured"}


@pytest.mark.parametrize(("gain", "outcome"), [(0.0, "held"), (2.0, "did not hold")])
def test_a_control_that_rises_is_told(planned: Planned, tmp_path: Path, gain: float, outcome: str) -> None:
    runs = _keep(planned, tmp_path, {"lora": _three((0.5, 0.02), (1.0, 0.1), (2.0, 0.3))})
    before, after = _asked(0.0, 0), _asked(0.0, 1)
    raised = Measurement(tuple(replace(one, numerators=one.numerators + gain) for one in after.quantities))
    control = contrasts(BINDING, before, raised)[STYLE]
    number = Number(control.value, *control.interval, control) if control.interval else None
    assert number is not None
    changed = [replace(run, numbers={**run.numbers, "control": number}) for run in runs if run.numbers]
    assert {one.claim: one.outcome for one in verdicts(by_arm(changed))}["facts never trained stay at chance"] == outcome


def test_only_runs_that_learned_and_learned_alike_are_matched(planned: Planned, tmp_path: Path) -> None:
    numbers = {"lora": _three((0.01, 0.0), (1.0, 0.1), (2.0, 0.3)), "full": _three((0.01, 0.5), (1.1, 0.6), (3.0, 0.9))}
    arms = by_arm(_keep(planned, tmp_path, numbers))
    pair = matched(arms["lora"], arms["full"])
    assert pair is not None
    assert (pair.one.rate, pair.other.rate) == (6e-4, 6e-5)  # not the first rates, which differ least: nothing was learned there
    assert pair.forgotten.value == pytest.approx(-0.5)
    assert matched(arms["lora"][2:], arms["full"][2:]) is None


def test_the_page_says_what_is_missing_and_names_the_file_of_every_number(planned: Planned, tmp_path: Path) -> None:
    _keep(planned, tmp_path, {"lora": _three((0.5, 0.02), (1.234, 0.1), (0.7, 0.3))})
    text = write(planned, tmp_path, "cpu").read_text(encoding="utf-8")
    assert "3 of 33 runs, 28,000 tokens each" in text
    assert "**Not all was measured**" in text
    assert "full_learning_rate-2e-05 (not measured)" in text
    assert "+1.23 [+1.13, +1.33]" in text
    assert text.count("](runs/cpu/lora_learning_rate-") == 3
    assert "embeddings too; rates 0.1 (embeddings), 0.5 (attention), 2 (mlp) | not measured |" in text
    image = ElementTree.fromstring((tmp_path / page.plot_name("cpu")).read_text(encoding="utf-8"))
    assert len(list(image.iter("{http://www.w3.org/2000/svg}circle"))) == 3 + 1  # and the name's


def test_without_runs_the_page_holds_no_figure_and_an_old_plot_is_removed(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / page.plot_name("cpu")).write_text("old")
    text = write(planned, tmp_path, "cpu").read_text(encoding="utf-8")
    assert "**Not measured.**" in text
    assert "[+" not in text.split("## Cautions")[0]
    assert not (tmp_path / page.plot_name("cpu")).exists()


def test_a_file_of_other_settings_is_not_taken_for_the_run(planned: Planned, tmp_path: Path) -> None:
    one = planned.cases[0]
    path, found = tmp_path / f"{one[0].run.name}.json", _file(one, {"learned": (1.0, 0.1)})
    path.write_text(json.dumps(found | {"config": found["config"] | {"train.epochs": 7}}))
    (run,) = records.read(_only(planned, one), tmp_path)
    assert not run.numbers
    assert "other settings" in run.why_not


def test_a_best_rate_at_an_end_of_its_grid_is_told(planned: Planned, tmp_path: Path) -> None:
    _keep(planned, tmp_path, {"lora": _three((0.5, 0.0), (1.0, 0.1), (2.0, 0.3)), "dora": _three((0.5, 0.0), (1.0, 0.1), (0.2, 0.3))})
    text = write(planned, tmp_path, "cpu").read_text(encoding="utf-8")
    assert "| lora: LoRA r=16 on all linear layers | 0.002 (an end of its grid) |" in text
    assert "| dora: DoRA r=16 | 0.0006 |" in text


def test_what_a_run_left_is_copied_without_names_of_this_machine_and_old_files_go(planned: Planned, tmp_path: Path) -> None:
    (case, loaded), failed, waiting = planned.cases[:3]
    run = tmp_path / "runs" / case.run.name
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps(loaded.config.model_dump(mode="json") | {"output": str(run)}))
    environment = {"machine": {"kind": "cpu", "name": "n", "bf16": True, "devices": 2}, "versions": {"torch": "2"}, "system": "a host"}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", "tokens": 35, "seconds": 1.5}) + "\n" for _ in range(2)))
    content = _file((case, loaded), {"learned": (1.0, 0.1)})
    digest = write_items(run / "eval" / "results.json", {"knowledge": {"base": _asked(0.0, 0), "tuned": _asked(1.0, 1)}, "loss": {}})
    record = {"at": str(run), "items": digest, "questions": content["questions"]}
    (run / "eval" / "results.json").write_text(json.dumps({**content, "run": str(run), "record": record, "seconds": 4.0}))
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "old.json").write_text("{}")
    before = json.dumps(_file(waiting, {"learned": (2.0, 0.1)}))
    (folder / f"{waiting[0].run.name}.json").write_text(before)
    here = _only(planned, (replace(case, run=run), loaded), failed, (replace(waiting[0], run=tmp_path / waiting[0].run.name), waiting[1]))
    records.copy(here, {failed[0].run.name: "training: it diverged"}, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{one.run.name}.json" for one, _ in here.cases)
    kept = (folder / f"{case.run.name}.json").read_text()
    assert str(tmp_path) not in kept
    assert "a host" not in kept
    assert not [name for name in json.loads(kept)["items"]["knowledge"] if "code" in name]  # a figure that the page does not need
    first, second, third = records.read(here, folder)
    assert first.numbers["learned"].sampled is not None
    assert (first.numbers["learned"].value, first.tokens, first.seconds) == (1.0, 70, 7.0)
    assert second.why_not == "training: it diverged"
    assert third.numbers["learned"].value == 2.0  # not measured here: its file stays
