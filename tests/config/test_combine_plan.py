"""Plans of `finetune combine`: what is read, what is refused, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.combine import AdapterOutput, Average, Ties, plan_shape, weights_of
from finetune.config.combine_file import load_plan
from finetune.config.shape import Block
from finetune.errors import ConfigError

GOOD = """\
# two chapters
method: ties
density: 0.3
adapters:
  - {path: runs/a, weight: 1}
  - path: /elsewhere/b
    weight: -0.5
output: {kind: adapter, rank: 32}
"""


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return load_plan(path)


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return "\n".join(map(str, caught.value.problems))


def test_a_plan_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    plan = load(tmp_path, GOOD)
    assert isinstance(plan, Ties)
    assert [entry.path for entry in plan.adapters] == [str(tmp_path / "runs" / "a"), "/elsewhere/b"]
    assert weights_of(plan) == (1.0, -0.5)
    assert plan.output == AdapterOutput(kind="adapter", rank=32)
    assert (plan.trim, plan.scale, plan.base.weights) == ("model", 1.0, "dequantized")
    average = load(tmp_path, "method: average\nadapters: [{path: a}, {path: b}]\n")
    assert isinstance(average, Average)
    assert weights_of(average) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("old", "new", "what", "where", "fix"),
    [
        ("density", "densitty", "unknown key `densitty`", ":3:1", "did you mean `density`?"),
        ("method: ties", "method: tie", '`method` is "tie"', ":2:9", "did you mean `ties`?"),
        ("method: ties\n", "", "`method` is missing", "plan.yaml", "dare-ties"),
        ("method: ties", "metod: ties", "`method` is missing", "plan.yaml", "did you mean `method` by `metod`?"),
        ("density: 0.3", "seed: 3", "unknown key `seed`", ":3:1", "`seed` goes with `method: dare-linear` or `method: dare-ties`"),
        ("density: 0.3", "density: 0", "`density` is 0; allowed: a number above 0 and up to 1", ":3:10", "density: 0.2"),
        ("density: 0.3", "drop: 0.7", "unknown key `drop`", ":3:1", "1 - p"),
        ("path: runs/a", "run: runs/a", "unknown key `run` in `adapters.0`", ":5:6", "with `path`"),
        ("weight: 1}", "weight: .nan}", "`adapters.0.weight`", ":5", ""),
        ("weight: 1}", "weight: one}", '`adapters.0.weight` is "one"', ":5", ""),
        ("kind: adapter, rank: 32", "kind: adapter", "`output.rank` is missing", ":8:1", "rank: 32"),
        ("kind: adapter, rank: 32", "kind: model, rank: 32", "unknown key `rank` in `output`", ":8", "known here: `kind` and `dtype`"),
        ("density: 0.3", "density: 0.3\ndensity: 0.2", "density", ":4:1", ""),
        ("kind: adapter", "kind: lora", '`output.kind` is "lora"; allowed: `model` or `adapter`', ":8:16", ""),
    ],
)
def test_a7_what_is_wrong_is_said_with_place_and_fix(tmp_path: Path, old: str, new: str, what: str, where: str, fix: str) -> None:
    assert old in GOOD
    found = problems(tmp_path, GOOD.replace(old, new, 1))
    assert what in found
    assert where in found
    assert fix in found
    assert "None" not in found


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "method: dare-ties\nadapters: [{weight: 1}]\nsed: 3\noutput: {kind: model, dtype: int8}\n")
    for text in ("`density` is missing", "`adapters.0.path` is missing", "did you mean `seed`?", "`output.dtype` is"):
        assert text in found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "a plan is a mapping"),
        ("- a\n", "a plan is a mapping"),
        ("method: average\nadapters: []\n", "`adapters` is empty"),
        ("method: average\nadapters: runs/a\n", "`adapters` is"),
        ("method: average\nadapters: [runs/a]\n", "`adapters.0` is"),
        ("method: average\nadapters: [{path: a, weight: 2}]\n", "for weights use `method: task-arithmetic`"),
        ("method: task-arithmetic\nadapters: [{path: a, weight: 0}]\n", "all weights are zero"),
        ("method: average\nadapters: [{path: a}]\nbase: {revision: abc}\n", "`base.revision` belongs to `base.id`"),
        ("method: average\nadapters: [{path: a}]\noutput: {kind: adapter, rank: 0}\n", "`output.rank` is 0"),
        ("method: average\nadapters: [{path: a}]\n base: {}\n", ""),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, what: str) -> None:
    assert what in problems(tmp_path, text)


def test_a_missing_file_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the file"):
        load_plan(tmp_path / "none.yaml")


DOCS = Path(__file__).parents[2] / "docs" / "combine.md"


def test_the_plans_of_the_documentation_are_plans(tmp_path: Path) -> None:
    blocks = DOCS.read_text().split("```yaml\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        load(tmp_path, block.partition("```")[0])


def test_the_documentation_has_every_method_and_key() -> None:
    text = DOCS.read_text()
    for tag, member in plan_shape().members.items():
        assert f"| `{tag}` |" in text
        assert isinstance(member, Block)
        for key in set(member.entries) - {"method", "adapters"}:
            assert f"`{key}" in text, key


def test_a_base_in_the_working_directory_is_recorded_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans").mkdir()
    for stated, read in (("tiny", str(tmp_path / "tiny")), ("./tiny", str(tmp_path / "plans" / "tiny")), ("owner/name", "owner/name")):
        plan = load(tmp_path / "plans", f"method: average\nadapters: [{{path: a}}]\nbase: {{id: {stated}}}\n")
        assert isinstance(plan, Average)
        assert plan.base.id == read
