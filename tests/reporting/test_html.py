"""The page tells what the run's files tell, whole, escaped, and without asking for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError, VerificationError
from finetune.reporting.charts import MAX_STEPS, curves
from finetune.reporting.html import write_report
from finetune.reporting.record import read_records
from finetune.runs import RunDirectory
from tests.reporting.conftest import DOCTOR, FINDING, HOSTILE, losses

Make = Callable[..., RunDirectory]


class Parsed(HTMLParser):
    """The tags of a page, its text, and what its scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "  # cells are words of their own
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def parsed(run: RunDirectory) -> Parsed:
    return Parsed(write_report([run]).read_text())


def test_c10_text_of_models_and_data_is_text(make_run: Make) -> None:
    page = parsed(make_run())
    assert len(page.scripts) == 3  # numbers, library, drawing: none of them from a row
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # question, answer, note of the evaluation, prompt, two samples, finding, session, reason, group, model, machine twice, model in config
    assert page.text.count(HOSTILE) >= 13
    assert json.loads(page.scripts[0])["charts"][1]["series"][1]["name"].endswith(HOSTILE)


def test_the_page_names_no_address_and_its_policy_lets_nothing_in_but_its_own_two_scripts(make_run: Make) -> None:
    text = write_report([make_run()]).read_text()
    page = Parsed(text)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    policy = next(str(attributes["content"]) for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    sums = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in sums)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert rules["style-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()}'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    assert text.index("Content-Security-Policy") < text.index("<script")


def test_the_page_says_what_was_planned_and_what_was_measured(make_run: Make) -> None:
    text = " ".join(parsed(make_run()).text.split())
    assert "memory of a device 1.50 GiB 1.00 GiB -33%" in text
    assert "tokens a second 125 100 stated; -20%" in text  # 100 n tokens in n seconds
    assert "tokens 3,600 3,600" in text
    assert "time in steps 28.8 s 36.0 s" in text
    assert "waiting for rows – 10.0%" in text


def test_every_part_of_a_run_is_shown(make_run: Make) -> None:
    text = " ".join(parsed(make_run()).text.split())
    for shown in (
        "2.000 1.875 to 2.125",  # the base and its interval
        "1.000 0.875 to 1.125 -1.000 (-1.250 to -0.750) better",
        "override -o optimizer.learning_rate=0.1",
        "my.yaml:3",
        "1 defaults",
        "8 of 8 steps",
        "same first choice 99.2%",
        "4.216, 0.6353, 0.6341",
        "-o optimizer.learning_rate=1e-4",
        "largest spike, nats: 2.5",
        "2 rules ran, 1 could not",
        "after step 8",
        "2026-01-02 03:04 UTC",
        "ended by: the loss is not finite",
    ):
        assert shown in text, shown


def test_commands_of_the_page_are_taken_by_a_shell_as_they_stand(make_run: Make) -> None:
    run = make_run("a run")
    overrides = ["train.early_stopping={patience: 2}", 'data.train=[{"source": "/data/a b.jsonl"}]']
    diagnosis = json.loads((run.path / "doctor.json").read_text())
    diagnosis["findings"][0]["overrides"] = overrides
    (run.path / "doctor.json").write_text(json.dumps(diagnosis))
    (run.evaluations / "results.json").unlink()
    shown = html.unescape(write_report([run]).read_text())
    options = re.search(r'<pre class="text">(-o .*?)</pre>', shown)
    command = re.search(r"<code>(finetune eval .*?)</code>", shown)
    assert options
    assert command
    assert shlex.split(options[1]) == ["-o", overrides[0], "-o", overrides[1]]
    assert shlex.split(command[1]) == ["finetune", "eval", str(run.path)]


def test_the_curves_hold_the_rows_as_they_are(make_run: Make) -> None:
    data = json.loads(parsed(make_run()).scripts[0])
    by_title = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert list(by_title) == [
        "Loss",
        "Learning rate by group",
        "Gradient norm",
        "Throughput",
        "Memory of a process",
        "Waiting for rows",
    ]
    assert data["axes"][0]["step"] == list(range(1, 9))
    assert data["axes"][0]["tokens"] == [100 * n * (n + 1) // 2 for n in range(1, 9)]
    training, validation = by_title["Loss"]
    assert training["values"] == pytest.approx([4 / n for n in range(1, 9)], rel=1e-6)
    trailing = [sum(4 / k for k in range(max(1, n - 2), n + 1)) / min(n, 3) for n in range(1, 9)]
    assert training["means"] == pytest.approx(trailing, rel=1e-6)
    assert validation["means"] == []
    assert validation["values"] == [None, None, None, 0.5, None, None, None, 0.25]
    assert {series["values"][0] for series in by_title["Throughput"]} == {100.0, 125.0}  # measured, planned


def test_a_run_that_has_only_begun_has_a_page_too(make_run: Make) -> None:
    run = make_run()
    for path in (run.metrics, run.evaluations / "results.json", run.path / "merge.json", run.path / "doctor.json"):
        path.unlink()
    (run.adapter / "training.json").unlink()
    page = parsed(run)
    assert "Not evaluated yet" in page.text
    assert "Not diagnosed yet" in page.text
    assert "not finished: 0 of 8 steps" in page.text
    assert page.scripts == []


def test_a_run_of_an_older_version_has_a_page_too(make_run: Make) -> None:
    run = make_run()
    old = [{key: row[key] for key in row if key not in ("input_seconds", "memory_bytes")} for row in losses(3)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in old))
    results: dict[str, Any] = json.loads((run.evaluations / "results.json").read_text())
    for one in results["figures"]:
        del one["intervals"], one["changes"]
    del results["notes"]
    (run.evaluations / "results.json").write_text(json.dumps(results))
    environment = json.loads(run.environment.read_text())
    del environment["origins"], environment["sessions"]
    run.environment.write_text(json.dumps(environment))
    plan = json.loads(run.plan.read_text())
    del plan["plan"]
    run.plan.write_text(json.dumps(plan))
    page = parsed(run)
    assert "did not record where its values come from" in page.text
    assert [chart["title"] for chart in json.loads(page.scripts[0])["charts"]][-1] == "Throughput"


def figure_changed(run: RunDirectory, **changes: Any) -> str:
    """The words of the page of ``run`` whose first figure has ``changes``."""
    results: dict[str, Any] = json.loads((run.evaluations / "results.json").read_text())
    results["figures"][0] |= changes
    (run.evaluations / "results.json").write_text(json.dumps(results))
    return " ".join(parsed(run).text.split())


def test_a_second_trained_model_is_shown_against_the_first(make_run: Make) -> None:
    change = {"difference": 0.125, "low": 0.0625, "high": 0.1875, "p": 0.01, "verdict": "worse"}
    text = figure_changed(make_run(), between={"tuned": change})
    assert text.count("against the first trained: +0.125 (+0.062 to +0.188); worse") == 1


def test_a_change_that_is_told_from_zero_is_seen_to_be(make_run: Make) -> None:
    change = {"difference": 0.0013, "low": 0.0001, "high": 0.0025, "p": 0.01, "verdict": "worse"}
    assert "+0.0013 (+0.0001 to +0.0025)" in figure_changed(make_run(), changes={"tuned": change})  # not +0.000 to +0.003


def test_several_runs_are_compared(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run("slow", rate=0.1), make_run("fast", steps=4, rate=0.2)]
    page = Parsed(write_report(runs, tmp_path / "both.html").read_text())
    text = " ".join(page.text.split())
    assert "optimizer.learning_rate 0.1 0.2" in text  # the only setting that differs
    assert "tuning.rank" not in text[: text.index("Curves")]
    assert "last training loss 0.5 1" in text
    assert "slow: base slow: tuned fast: base fast: tuned" in text
    data = json.loads(page.scripts[0])
    assert [(one["run"], one["name"]) for one in data["charts"][0]["series"]] == [
        (0, "training"),
        (0, "validation"),
        (1, "training"),
        (1, "validation"),
    ]
    assert [len(axes["step"]) for axes in data["axes"]] == [8, 4]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_runs_of_one_name_are_told_apart(make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    records = read_records([make_run("a/run"), make_run("b/run")])
    assert [record.name for record in records] == ["a/run", "b/run"]


def test_a_diagnosis_is_worded_as_on_a_terminal(make_run: Make) -> None:
    run = make_run()
    evidence = {"fall, nats": 0.12345678901234567, "rows": 12345, "group": "attention"}
    note = "metrics.jsonl is damaged: line 7 is no JSON, and the curve lacks them"
    (run.path / "doctor.json").write_text(json.dumps(DOCTOR | {"findings": [FINDING | {"evidence": evidence}], "notes": [note]}))
    text = " ".join(parsed(run).text.split())
    assert "fall, nats: 0.1235; rows: 12,345; group: attention" in text
    assert note in text


def test_a_diagnosis_of_less_than_there_is_says_so(make_run: Make) -> None:
    run = make_run()
    assert "Made before" not in parsed(run).text
    results, doctor = run.results, run.path / "doctor.json"
    os.utime(results, (doctor.stat().st_mtime + 60,) * 2)
    assert "Made before the last evaluation" in " ".join(parsed(run).text.split())
    doctor.write_text(json.dumps(DOCTOR | {"steps": 5}))
    assert "Made before step 8: it saw 5 steps" in " ".join(parsed(run).text.split())


def test_what_the_page_cannot_be_made_of_is_refused(make_run: Make, tmp_path: Path) -> None:
    run, other = make_run(), make_run("other")
    with pytest.raises(ConfigError, match=r"-O comparison\.html"):
        write_report([run, other])
    with pytest.raises(ConfigError, match="named twice"):
        write_report([run, RunDirectory(tmp_path / "other" / ".." / "run")], tmp_path / "x.html")
    with pytest.raises(ConfigError, match="does not exist"):
        write_report([run], tmp_path / "missing" / "x.html")
    with run.metrics.open("a") as file:
        file.write('{"kind": "step", "step": 9}\n')
    with pytest.raises(VerificationError, match="row 13 lacks epoch"):
        write_report([run])
    (other.evaluations / "results.json").write_text("{}")
    with pytest.raises(VerificationError, match="no systems, figures, samples"):
        write_report([other])


def test_a_long_run_is_thinned_without_losing_a_spike(make_run: Make) -> None:
    run = make_run()
    rows = losses(50_000)
    rows[31_415]["loss"], rows[27_182]["loss"] = 99.0, -1.0
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = curves(read_records([run]), [{}])
    values = [value for value in drawn.charts[0].series[0].values if value is not None]
    assert len(values) <= MAX_STEPS + 2
    assert 99.0 in values
    assert -1.0 in values
    assert drawn.positions[0].step[0] == 1
    assert drawn.positions[0].step[-1] == 50_000
    assert drawn.positions[0].tokens[-1] == 100 * 50_000 * 50_001 // 2  # of all steps, drawn or not
    assert drawn.thinned == ("run",)
    rows_of_last = rows[-1667:]  # a thirtieth of all steps
    assert drawn.charts[0].series[0].means[-1] == pytest.approx(sum(row["loss"] for row in rows_of_last) / 1667)
