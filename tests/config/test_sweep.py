"""The file of `finetune sweep`: which runs it makes, and every problem of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.config.sweep import Sweep, cases, load_sweep
from finetune.errors import ConfigError


def sweep_file(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def problems(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        load_sweep(path)
    return str(refused.value)


def test_every_arm_meets_every_combination_of_the_grid() -> None:
    sweep = Sweep(
        config="c.yaml",
        output="runs/s",
        arms={"small": {"tuning.rank": 4}, "large": {"tuning.rank": 64}},
        grid={"optimizer.learning_rate": (1e-4, 3e-4), "seed": (0, 1, 2)},
    )
    found = list(cases(sweep))
    assert len(found) == len({case.run for case in found}) == 2 * 2 * 3
    assert found[0].settings == {"tuning.rank": 4, "optimizer.learning_rate": 1e-4, "seed": 0}
    assert found[0].run == Path("runs/s/small_learning_rate-0.0001_seed-0")
    assert found[0].overrides[-1] == 'output="runs/s/small_learning_rate-0.0001_seed-0"'


def test_without_arms_there_is_one_and_without_a_grid_one_run_an_arm() -> None:
    assert [case.run.name for case in cases(Sweep(config="c", output="o", grid={"seed": (1, 2)}))] == ["seed-1", "seed-2"]
    assert [case.run.name for case in cases(Sweep(config="c", output="o", arms={"a": {}, "b": {}}))] == ["a", "b"]
    assert [case.run.name for case in cases(Sweep(config="c", output="o"))] == ["run"]


def test_an_arm_may_have_its_own_values_of_a_key_of_the_grid() -> None:
    sweep = Sweep(config="c", output="o", arms={"a": {}, "b": {"seed": [7], "tuning.rank": 2}}, grid={"seed": (1, 2)})
    assert [case.settings for case in cases(sweep)] == [{"seed": 1}, {"seed": 2}, {"seed": 7, "tuning.rank": 2}]
    assert [case.run.name for case in cases(sweep)] == ["a_seed-1", "a_seed-2", "b_seed-7"]


def test_values_reach_the_configuration_as_they_are_written(write_config: Callable[..., Path], tmp_path: Path) -> None:
    write_config()
    path = sweep_file(
        tmp_path / "sweep.yaml",
        config="run.yaml",
        output=str(tmp_path / "s"),
        arms={"a": {"tuning.targets": ["q_proj", "v_proj"], "train.early_stopping": None}},
        grid={"optimizer.learning_rate": [1e-4]},
    )
    ((case, loaded),) = load_sweep(path).cases
    assert loaded.config.tuning.targets == ("q_proj", "v_proj")  # type: ignore[union-attr]
    assert loaded.config.optimizer.learning_rate == 1e-4
    assert loaded.config.output == str(case.run)


def test_what_is_wrong_with_the_file_is_said_with_its_line(tmp_path: Path) -> None:
    text = problems(sweep_file(tmp_path / "s.yaml", confg="a.yaml", output="o", grid={"seed": []}, evaluate="yes"))
    assert "unknown key `confg`" in text
    assert "did you mean `config`?" in text
    assert "`config` is missing" not in text
    assert "`grid.seed`" in text
    assert "`evaluate`" in text
    assert "s.yaml:1" in text
    assert "`config` is missing" in problems(sweep_file(tmp_path / "t.yaml", output="o"))
    listed = tmp_path / "u.yaml"
    listed.write_text("- a\n")
    assert "a sweep is a mapping" in problems(listed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"arms": {"a/b": {}}}, "'a/b' cannot be part of a directory's name"),
        ({"arms": {"a": {"seed": 1}}, "grid": {"seed": [1]}}, "`seed` is varied by the grid, and the arm a sets it"),
        ({"arms": {"a": {"seed": []}}, "grid": {"seed": [1]}}, "give the arm a list of its own values"),
        ({"arms": {"a": {"output": "x"}}}, "each run has its own output"),
        ({"grid": {"output": ["x"]}}, "each run has its own output"),
        ({"grid": {"tuning.targets": ["q", "q!"]}}, "two runs would be called targets-q"),
        ({"select": "general text: loss", "evaluate": False}, "remove one of the two"),
    ],
)
def test_contradictions_are_told(tmp_path: Path, content: dict[str, object], said: str) -> None:
    assert said in problems(sweep_file(tmp_path / "s.yaml", config="c.yaml", output="o", **content))


def test_every_run_is_checked_before_the_first_and_a_common_fault_is_said_once(write_config: Callable[..., Path], tmp_path: Path) -> None:
    write_config()
    grid = {"optimizer.learning_rate": [1e-4, -1.0], "tuning.rank": [4, 0]}
    text = problems(sweep_file(tmp_path / "sweep.yaml", config="run.yaml", output=str(tmp_path / "s"), grid=grid))
    assert text.count("`optimizer.learning_rate` is -1.0") == 1
    assert text.count("`tuning.rank` is 0") == 1
    write_config("wrong.yaml", sed=1)
    text = problems(sweep_file(tmp_path / "sweep.yaml", config="wrong.yaml", output=str(tmp_path / "s"), grid=grid))
    assert text.count("unknown key `sed`") == 1
    assert "rank" not in text
    assert "there is no such file" in problems(sweep_file(tmp_path / "sweep.yaml", config="none.yaml", output="o"))


def test_the_configuration_of_a_run_is_no_sweep(write_config: Callable[..., Path]) -> None:
    text = problems(write_config())
    assert "the configuration of one run, not a sweep" in text
    assert "`config: run.yaml`" in text
    assert text.count("fix:") == 1


def test_the_example_of_the_documentation_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    planned = load_sweep(tmp_path / "sweep.yaml")
    assert len(planned.cases) == 6
    for key in Sweep.model_fields:
        assert f"| `{key}` |" in page


def test_a_figure_that_no_run_will_have_is_told_before_the_first_is_trained(write_config: Callable[..., Path], tmp_path: Path) -> None:
    write_config()
    content = {"config": "run.yaml", "output": str(tmp_path / "s"), "grid": {"seed": [0, 1]}}
    path = sweep_file(
        tmp_path / "sweep.yaml", **content, select="general text: los", columns=["validation: perplexity", "substanc: answer loss"]
    )
    text = problems(path)
    assert text.count("will have no figure called") == 2
    assert "run seed-0 will have no figure called 'general text: los'" in text
    assert "did you mean 'general text: loss'?" in text
    assert "sweep.yaml:10:9" in text
    assert not (tmp_path / "s").exists()
    assert len(load_sweep(sweep_file(path, **content, select="general text: loss", columns=["validation: perplexity"])).cases) == 2
    text = problems(sweep_file(path, **content, evaluate=False, columns=["general text: loss"]))
    assert "there are: validation loss" in text


def test_figures_that_rows_or_another_program_name_are_taken_as_they_are(write_config: Callable[..., Path], tmp_path: Path) -> None:
    content = {"config": "run.yaml", "output": str(tmp_path / "s")}
    write_config(evaluation={"tasks": [{"task": "choices", "name": "mine", "data": {"source": "q.jsonl"}}]})
    for name in ("mine: accuracy (chance 25%)", "mine: loss of the right answer"):
        assert load_sweep(sweep_file(tmp_path / "sweep.yaml", **content, select=name)).sweep.select == name
    assert "did you mean 'mine: accuracy (chance N%)'" in problems(sweep_file(tmp_path / "sweep.yaml", **content, select="mine: acuracy"))
    write_config(evaluation={"tasks": [{"task": "harness", "tasks": ["arc_easy"]}]})
    assert load_sweep(sweep_file(tmp_path / "sweep.yaml", **content, select="arc_easy: acc")).sweep.select == "arc_easy: acc"
