"""`finetune config` and `finetune init`, run as a user runs them: in a process of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def finetune(tmp_path: Path) -> Run:
    """Run the command line in an empty directory."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        command = [sys.executable, "-c", "from finetune.cli.app import main; main()", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text("extends: style\nmodel: {id: a/b}\ndata: {train: [{source: rows.jsonl}]}\noutput: runs/x\n")
    return path


@pytest.mark.usefixtures("good")
def test_check_accepts_and_notes_missing_data(finetune: Run, tmp_path: Path):
    run = finetune("config", "check", "good.yaml")
    assert (run.returncode, run.stdout) == (0, "good.yaml: valid\n")
    assert f"note: {tmp_path / 'rows.jsonl'} does not exist yet" in run.stderr
    (tmp_path / "rows.jsonl").touch()
    assert finetune("config", "check", "good.yaml").stderr == ""


def test_check_reports_every_problem_without_a_traceback(finetune: Run, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model: {id: a/b}\ntuning: {method: lora, rnk: 3}\ndata: {train: []}\n")
    run = finetune("config", "check", "bad.yaml", "-o", "seed=-1")
    assert (run.returncode, run.stdout) == (2, "")
    assert "Traceback" not in run.stderr
    for expected in ("bad.yaml:2:24", "did you mean `rank`?", "bad.yaml:3:15", "`output` is missing", "-o seed=-1"):
        assert expected in run.stderr
    assert re.search(r"2 \| tuning: \{method: lora, rnk: 3\}\n +\| {24}\^\n", run.stderr)


@pytest.mark.usefixtures("good")
def test_check_as_json(finetune: Run):
    run = finetune("config", "check", "good.yaml", "--json")
    assert json.loads(run.stdout)["valid"] is True
    assert json.loads(run.stdout)["problems"] == []


def test_check_as_json_tells_every_problem_in_its_parts(finetune: Run, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model: {id: a/b}\ntuning: {method: lora, rnk: 3}\ndata: {train: []}\n")
    run = finetune("config", "check", "bad.yaml", "--json", "-o", "seed=-1")
    assert run.returncode == 2
    found = json.loads(run.stdout)
    assert (found["config"], found["valid"], found["notes"]) == ("bad.yaml", False, [])
    places = {problem["where"]: (problem["line"], problem["column"]) for problem in found["problems"]}
    assert places == {"bad.yaml": (None, None), "bad.yaml:2:24": (2, 24), "bad.yaml:3:15": (3, 15), "-o seed=-1": (None, None)}
    misspelt = next(problem for problem in found["problems"] if problem["line"] == 2)
    assert (misspelt["what"], misspelt["fix"]) == ("unknown key `rnk` in `tuning`", "did you mean `rank`?")
    assert all(problem["what"] in run.stderr for problem in found["problems"])  # for people, as without --json
    assert json.loads(finetune("config", "check", "none.yaml", "--json").stdout)["problems"][0]["what"] == "there is no such file"


def told(finetune: Run, *arguments: str) -> dict[str, str]:
    """What is wrong -> what it says to do, of a command that is refused."""
    run = finetune(*arguments)
    assert run.returncode == 2, run.stderr
    return {each.splitlines()[0]: each.rpartition("fix:   ")[2].strip() for each in run.stderr.split("error: ")[1:]}


def test_a_misspelt_method_does_not_hide_what_else_is_wrong(finetune: Run, tmp_path: Path):
    tuning = "tuning: {method: lroa, rnk: 3, alpha: -1, init: {method: loftqq, iteration: 2}}\n"
    rest = "data: {train: [{source: a.jsonl}]}\noutput: runs/x\nevaluation: {tasks: [{task: los, nme: x}]}\n"
    (tmp_path / "bad.yaml").write_text("model: {id: a/b}\n" + tuning + rest)
    found = json.loads(finetune("config", "check", "bad.yaml", "--json").stdout)["problems"]
    fixes = {problem["what"].partition(" is ")[0]: problem["fix"] for problem in found}
    assert fixes == {
        "`tuning.method`": "did you mean `lora`?",
        "unknown key `rnk` in `tuning`": "did you mean `rank`?",
        "`tuning.alpha`": fixes["`tuning.alpha`"],
        "`tuning.init.method`": "did you mean `loftq`?",
        "unknown key `iteration` in `tuning.init`": "did you mean `iterations`?",
        "`evaluation.tasks.0.task`": "did you mean `loss`?",
        "unknown key `nme` in `evaluation.tasks.0`": "did you mean `name`?",
    }


def test_where_no_method_is_near_only_what_is_wrong_with_every_one_is_told(finetune: Run, tmp_path: Path):
    rest = "data: {train: [{source: a.jsonl}]}\noutput: runs/x\n"
    (tmp_path / "bad.yaml").write_text("model: {id: a/b}\ntuning: {method: something, rank: 0, dora: true, nonsense: 1}\n" + rest)
    found = told(finetune, "config", "check", "bad.yaml")
    assert len(found) == 2, found  # not rank and dora: there are methods that have none
    assert "unknown key `nonsense` in `tuning`" in found


def test_a_misspelt_method_of_a_plan_does_not_hide_what_else_is_wrong(finetune: Run, tmp_path: Path):
    rest = "adapters: [{pth: a, weight: 2}]\noutput: {kind: modl, dtpe: fp32}\ndensty: 0.2\n"
    for method, meant in (("method: tis\n", "did you mean `ties`?"), ("metod: ties\n", "did you mean `method` by `metod`?"), ("", "")):
        (tmp_path / "plan.yaml").write_text(method + rest)
        found = told(finetune, "combine", "plan.yaml", "-O", "out")
        first, *others = found.items()
        assert first[0].startswith("`method` is")
        assert meant in first[1].replace("\n", " ")
        assert dict(others) == {
            "unknown key `pth` in `adapters.0`": "did you mean `path`?",
            '`output.kind` is "modl"; allowed: `model` or `adapter`': "did you mean `model`?",
            "unknown key `dtpe` in `output`": "did you mean `dtype`?",
            "unknown key `densty`": "did you mean `density`?",
        }


def test_check_loads_nothing_heavy(tmp_path: Path, good: Path):
    code = (
        "import sys\n"
        "from finetune.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'accelerate', 'datasets', 'bitsandbytes', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 700, len(sys.modules)\n"  # seconds are `make bench-startup`'s
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "config", "check", str(good)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.usefixtures("good")
def test_show_is_a_configuration_with_origins(finetune: Run, tmp_path: Path):
    run = finetune("config", "show", "good.yaml", "--any-machine", "-o", "seed=3")
    assert run.returncode == 0
    assert re.search(r"^seed: 3 +# override -o seed=3$", run.stdout, re.MULTILINE)
    assert re.search(r"^  rank: 8 +# preset .*style.yaml:\d+$", run.stdout, re.MULTILINE)
    assert re.search(r"^  id: a/b +# good.yaml:2$", run.stdout, re.MULTILINE)
    assert re.search(r"^  epochs: 3 +# preset ", run.stdout, re.MULTILINE)
    (tmp_path / "shown.yaml").write_text(run.stdout)
    again = finetune("config", "show", "shown.yaml", "--any-machine", "--json")
    first = finetune("config", "show", "good.yaml", "--any-machine", "--json", "-o", "seed=3")
    assert json.loads(again.stdout)["config"] == json.loads(first.stdout)["config"]
    assert json.loads(first.stdout)["origins"]["tuning.rank"]["kind"] == "preset"


@pytest.mark.usefixtures("good")
def test_show_gives_the_reason_of_each_auto_on_this_machine(finetune: Run):
    run = finetune("config", "show", "good.yaml", "-o", "train.precision=fp32")
    assert run.returncode == 0, run.stderr
    for key in ("tokens_per_device", "gradient_checkpointing"):
        assert re.search(rf"^  {key}: auto +# default; here \w+: .+$", run.stdout, re.MULTILINE)
    assert re.search(r"^  precision: fp32 +# override -o train.precision=fp32$", run.stdout, re.MULTILINE)


def test_schema_is_json(finetune: Run):
    assert "properties" in json.loads(finetune("config", "schema").stdout)
    assert json.loads(finetune("config", "schema").stdout) == json.loads((ROOT / "configs" / "finetune.schema.json").read_text())
    assert json.loads(finetune("config", "schema", "--preset").stdout) == json.loads((ROOT / "recipes" / "preset.schema.json").read_text())


def test_init_writes_a_config_that_checks(finetune: Run, tmp_path: Path):
    run = finetune("init", "new/mine.yaml", "--recipe", "domain-knowledge")
    assert (run.returncode, run.stdout) == (0, "new/mine.yaml\n")
    text = (tmp_path / "new" / "mine.yaml").read_text()
    assert text.count("#") > 5
    assert Path(text.splitlines()[0].partition("$schema=")[2]).is_file()
    assert yaml.safe_load(text)["extends"] == "domain-knowledge"
    assert finetune("config", "check", "new/mine.yaml").returncode == 0


def test_init_overwrites_only_when_told(finetune: Run, tmp_path: Path):
    (tmp_path / "finetune.yaml").write_text("mine")
    run = finetune("init")
    assert run.returncode == 2
    assert "the file exists" in run.stderr
    assert (tmp_path / "finetune.yaml").read_text() == "mine"
    assert finetune("init", "--force").returncode == 0
    assert (tmp_path / "finetune.yaml").read_text() != "mine"


def test_init_lists_and_suggests_recipes(finetune: Run):
    lines = finetune("init", "--list").stdout.splitlines()
    assert len(lines) == 8
    assert all(len(line) > 30 for line in lines)
    run = finetune("init", "--recipe", "domain")
    assert run.returncode == 2
    assert "did you mean `--recipe domain-knowledge`?" in run.stderr
    assert len(json.loads(finetune("init", "--list", "--json").stdout)) == 8
