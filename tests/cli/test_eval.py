"""`finetune eval` as it is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def test_models_are_measured_where_no_run_is(finetune: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"question": "Which?", "choices": ["this", "that"], "answer": number % 2} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("evaluation: {tasks: [{task: choices, data: {source: rows.jsonl}}]}\n")
    done = finetune("eval", tiny_model_dir, "--config", tmp_path / "own.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "eval" / "own.json").read_text())
    assert found["figures"][0]["name"] == "choices: accuracy (chance 50%)"
    assert found["record"]["data"]["choices"]["sha256"]
    assert "replaced" not in done.err
    again = finetune("eval", tiny_model_dir, "--config", tmp_path / "own.yaml", cwd=tmp_path)
    assert re.search(r"eval/own\.json of \d{4}-\d\d-\d\d \d\d:\d\d will be replaced; --name OTHER keeps both", again.err)
    kept = (tmp_path / "eval" / "own.json").read_text()
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    refused = finetune("eval", tiny_model_dir, "--config", tmp_path / "own.yaml", cwd=tmp_path)
    assert refused.code == 3
    assert "replaced" not in refused.err  # what is refused replaces nothing
    (tmp_path / "rows.jsonl").write_text('{"question": "Which?"}\n')
    refused = finetune("eval", tiny_model_dir, "--config", tmp_path / "own.yaml", cwd=tmp_path)
    assert refused.code == 3
    assert "replaced" not in refused.err
    assert (tmp_path / "eval" / "own.json").read_text() == kept
    shown = finetune("eval", tiny_model_dir, "-o", "evaluation.tasks=[{task: forgetting}]", cwd=tmp_path, COLUMNS="80")
    assert shown.code == 0, shown.err
    assert str(Path("eval") / f"{tiny_model_dir.name}.json") in shown.err


def test_what_cannot_be_measured_ends_without_a_traceback(finetune: Run, tmp_path: Path) -> None:
    for arguments in (["nowhere/at/all"], [tmp_path], ["builtin:other"], ["builtin:smollm2-135m", "--name", "a/b"]):
        done = finetune("eval", *arguments, cwd=tmp_path)
        assert done.code == 2, done.err
        assert "fix:" in done.err
        assert "Traceback" not in done.err


def test_a_file_that_is_not_there_is_told_with_the_key_that_names_it(finetune: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = finetune("eval", tiny_model_dir, "--config", "nope.yaml", cwd=tmp_path)
    assert done.code == 2
    assert "cannot read the file" in done.err
    assert "fix:   check the path" in done.err
    (tmp_path / "own.yaml").write_text("evaluation: {tasks: [{task: loss, data: {source: missing.jsonl}}]}\n")
    done = finetune("eval", tiny_model_dir, "--config", "own.yaml", cwd=tmp_path)
    assert done.code == 3
    assert "fix:   check the `source` that names it" in done.err
    assert "data.train" not in done.err
