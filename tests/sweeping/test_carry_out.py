"""Carrying out a sweep with commands that are fakes: what is run, what is passed over, what ends all and what only one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from finetune.config.dump import dump_config
from finetune.config.figure_names import GENERAL_QUESTIONS
from finetune.config.load import load_config
from finetune.config.sweep import Planned, load_sweep
from finetune.errors import ConfigError, RunInterruptedError
from finetune.evaluation.results import Change, Figure, Headline, Results
from finetune.sealed import seal
from finetune.sweeping.carry_out import carry_out
from finetune.sweeping.table import RECORD, finished_runs, require_figures, write_table


class Commands:
    """Stands for `finetune train` and `finetune eval`: leaves behind what they would."""

    def __init__(self, losses: dict[float, float], codes: dict[float, int] | None = None) -> None:
        self.losses, self.codes = losses, codes or {}
        self.seen: list[tuple[str, ...]] = []
        self.stop_at = 0

    def __call__(self, arguments: Sequence[str]) -> int:
        self.seen.append(tuple(arguments))
        if self.stop_at == len(self.seen):
            raise RunInterruptedError("the sweep was stopped by a signal", signal_number=signal.SIGTERM)
        return self._train(arguments) if arguments[0] == "train" else self._measure(Path(arguments[1]))

    def _train(self, arguments: Sequence[str]) -> int:
        config = load_config(Path(arguments[1]), [word for word in arguments[2:] if "=" in word]).config
        run, rate = Path(config.output), config.optimizer.learning_rate
        if code := self.codes.get(rate):
            return code
        (run / "adapter").mkdir(parents=True)
        (run / "environment.json").write_text("{}")
        (run / "plan.json").write_text(json.dumps({"steps": {"total": 1}}))
        (run / "config.yaml").write_text(dump_config(config))
        rows = [
            {"kind": "step", "step": 1, "loss": 1.0, "tokens": 10, "seconds": 0.5},
            {"kind": "evaluation", "step": 1, "validation_loss": self.losses[rate]},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        (run / "adapter" / "training.json").write_text(json.dumps({"step": 1, "run_steps": 1}))
        seal(run / "adapter")
        return 0

    def _measure(self, run: Path) -> int:
        (run / "eval").mkdir(exist_ok=True)
        rate = load_config(run / "config.yaml").config.optimizer.learning_rate
        change = Change(rate, rate - 0.005, rate + 0.005, 0.04, "better")
        figure = Figure("t", GENERAL_QUESTIONS, "share", 9, {"base": 0.25, "tuned": 0.25 + rate}, "higher", {}, {"tuned": change})
        headline = Headline("substance", "answer loss", "nats/token", "lower", "tuned", change)
        results = Results(str(run), ("base", "tuned"), (figure,), (), 1.0, headlines=(headline,))
        (run / "eval" / "results.json").write_text(json.dumps(results.as_dict()))
        return 0


RATES = [0.01, 0.02, 0.03]


@pytest.fixture
def planned(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Planned]:
    def plan(**content: object) -> Planned:
        write_config()
        settings = {"config": "run.yaml", "output": str(tmp_path / "s"), "grid": {"optimizer.learning_rate": RATES}} | content
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
        return load_sweep(tmp_path / "sweep.yaml")

    return plan


def test_each_run_is_trained_and_measured_and_the_best_of_each_arm_is_marked(planned: Callable[..., Planned]) -> None:
    plan, commands = planned(arms={"a": {}, "b": {"tuning.rank": 2}}), Commands({0.01: 3.0, 0.02: 1.0, 0.03: 2.0})
    table = write_table(plan, carry_out(plan, command=commands))
    assert [line[0] for line in commands.seen] == ["train", "eval"] * 6
    assert [row.name for row in table.rows if row.best] == ["a_learning_rate-0.02", "b_learning_rate-0.02"]
    assert json.loads((plan.directory / RECORD).read_text())["rows"][0]["figures"]["validation loss"]["value"] == 3.0
    assert table.rows[0].tokens == 10
    assert table.columns == ("substance: answer loss",)
    shown = table.rows[0].figures[GENERAL_QUESTIONS]
    assert (shown.value, shown.base, shown.low, shown.high, shown.better) == pytest.approx((0.26, 0.25, 0.005, 0.015, "higher"))
    by_accuracy = planned(select=GENERAL_QUESTIONS, arms={"a": {}, "b": {"tuning.rank": 2}})
    again = write_table(by_accuracy, carry_out(by_accuracy, command=commands))
    assert [row.name for row in again.rows if row.best] == ["a_learning_rate-0.03", "b_learning_rate-0.03"]


def test_what_is_done_is_not_done_again_and_a_longer_result_is_measured_anew(planned: Callable[..., Planned]) -> None:
    plan, commands = planned(), Commands(dict.fromkeys(RATES, 1.0))
    carry_out(plan, command=commands)
    commands.seen.clear()
    told: list[str] = []
    carry_out(plan, lambda _number, _of, _case, doing: told.append(doing), commands)
    assert commands.seen == []
    assert told == ["done already"] * 3
    first = plan.cases[0][0].run
    later = time.time() + 10
    os.utime(first / "adapter" / "MANIFEST.json", (later, later))
    carry_out(plan, command=commands)
    assert commands.seen == [("eval", str(first))]


def test_a_run_that_was_begun_is_resumed(planned: Callable[..., Planned]) -> None:
    plan = planned(evaluate=False)
    run = plan.cases[1][0].run
    run.mkdir(parents=True)
    (run / "environment.json").write_text("{}")
    (run / "config.yaml").write_text(dump_config(plan.cases[1][1].config))
    seen = []
    carry_out(plan, command=lambda arguments: seen.append(arguments[-1]) or 1)  # type: ignore[func-returns-value]
    assert [last == "--resume" for last in seen] == [False, True, False]


def test_a_run_that_diverges_does_not_end_the_others(planned: Callable[..., Planned]) -> None:
    plan, commands = planned(), Commands(dict.fromkeys(RATES, 1.0), {0.02: 5, 0.03: -9})
    table = write_table(plan, carry_out(plan, command=commands))
    assert [row.failure for row in table.rows] == [None, "training: it diverged", "training: it was killed by signal 9"]
    assert finished_runs(table) == [plan.cases[0][0].run]


def test_wrong_data_end_the_sweep_at_its_first_run(planned: Callable[..., Planned]) -> None:
    commands = Commands({}, {0.01: 3})
    with pytest.raises(ConfigError, match="the data are wrong"):
        carry_out(planned(), command=commands)
    assert len(commands.seen) == 1


def test_data_that_are_wrong_for_one_value_do_not_end_the_others(planned: Callable[..., Planned]) -> None:
    """Such as a `data.max_tokens` that is too small for a row: what the first run could read, it alone cannot."""
    plan = planned()
    table = write_table(plan, carry_out(plan, command=Commands(dict.fromkeys(RATES, 1.0), {0.02: 3})))
    assert [row.failure for row in table.rows] == [None, "training: the data are wrong", None]


def test_a_directory_with_another_run_is_left_alone(planned: Callable[..., Planned]) -> None:
    plan, commands = planned(), Commands(dict.fromkeys(RATES, 1.0))
    carry_out(plan, command=commands)
    commands.seen.clear()
    with pytest.raises(ConfigError, match=r"trained with another configuration: .*tuning\.rank"):
        carry_out(planned(config=_other(plan)), command=commands)
    assert commands.seen == []


def _other(plan: Planned) -> str:
    other = plan.path.parent / "other.yaml"
    other.write_text(plan.path.read_text().replace('"rank": 4', '"rank": 3'))
    assert other.read_text() != plan.path.read_text()
    return other.name


def test_an_interruption_says_where_the_sweep_stands(planned: Callable[..., Planned]) -> None:
    commands = Commands(dict.fromkeys(RATES, 1.0))
    commands.stop_at = 3
    with pytest.raises(RunInterruptedError, match=r"stopped at run 2 of 3") as stopped:
        carry_out(planned(), command=commands)
    assert stopped.value.exit_code == 143
    commands.stop_at = 0
    carry_out(planned(), command=commands)
    assert [line[0] for line in commands.seen] == ["train", "eval", "train", "train", "eval", "train", "eval"]


def test_a_figure_that_no_run_turns_out_to_have_is_told_after_the_first(planned: Callable[..., Planned]) -> None:
    plan, commands = planned(columns=["validation: loss"]), Commands(dict.fromkeys(RATES, 1.0))
    with pytest.raises(ConfigError, match="has no figure called 'validation: loss'"):
        carry_out(plan, command=commands, check=lambda outcome: require_figures(plan, outcome))
    assert [line[0] for line in commands.seen] == ["train", "eval"]
