"""Splits, weights, over-long rows, copies and overlap; what is cached, and when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from finetune.cache import cache_directory
from finetune.config.schema import Data
from finetune.data import key, reading
from finetune.data.prepare import prepare
from finetune.data.render import Renderer
from finetune.data.report import DataReport
from finetune.errors import DataError


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


def rows(path: Path, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question": f"Question {answer}?", "answer": answer}) + "\n" for answer in answers))
    return path


def data(*paths: Path, **settings: object) -> Data:
    sources = [{"source": str(path)} for path in paths]
    return Data.model_validate({"train": sources, "max_tokens": 64, **settings})


def test_a15_equal_rows_land_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n % 30) for n in range(90)])
    prepared = prepare(data(path, validation={"fraction": 0.3}), renderer, seed=1)
    train, validation = ({e.content_hash() for e in part} for part in (prepared.train, prepared.validation))
    assert train
    assert validation
    assert not train & validation
    assert len(train | validation) == 30
    assert prepared.counts["duplicate rows"] == len(prepared.train) - len(train)


def test_a15_split_does_not_depend_on_repetition(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(40)])
    once = prepare(data(path, validation={"fraction": 0.3}), renderer, seed=1)
    settings = Data.model_validate({"train": [{"source": str(path), "weight": 2.5}], "validation": {"fraction": 0.3}, "max_tokens": 64})
    often = prepare(settings, renderer, seed=1)
    assert {e.content_hash() for e in once.validation} == {e.content_hash() for e in often.validation}
    assert len(often.train) == 2 * len(once.train) + round(0.5 * len(once.train))


def test_a15_overlap_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    train = rows(tmp_path / "a.jsonl", ["1", "2", "3"])
    other = rows(tmp_path / "b.jsonl", ["9", "2"])
    with pytest.raises(DataError, match="also a training row") as caught:
        prepare(data(train, validation=[{"source": str(other)}]), renderer, seed=0)
    assert "b.jsonl:2" in caught.value.problems[0].where
    assert "a.jsonl:2" in caught.value.problems[0].where


def test_overlong_rows_follow_the_policy(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", ["1", "x" * 300])
    with pytest.raises(DataError, match="max_tokens") as caught:
        prepare(data(path), renderer, seed=0)
    assert caught.value.problems[0].where.endswith("a.jsonl:2")
    dropped = prepare(data(path, overlong="drop"), renderer, seed=0)
    assert (len(dropped.train), dropped.counts["dropped: over-long"]) == (1, 1)


def test_a1_truncation_that_leaves_no_supervised_token_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "long " * 100, "answer": "x"}) + "\n")
    with pytest.raises(DataError, match="no token that carries loss"):
        prepare(data(path, overlong="truncate"), renderer, seed=0)


def test_a9_the_fingerprint_follows_every_input(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(20)])
    prints = {
        prepare(data(path), renderer, seed=0).fingerprint,
        prepare(data(path, supervise="all"), renderer, seed=0).fingerprint,
        prepare(data(path, validation={"fraction": 0.2}), renderer, seed=0).fingerprint,
        prepare(data(path, validation={"fraction": 0.2}), renderer, seed=1).fingerprint,
    }
    rows(path, [str(n) for n in range(19)] + ["changed"])
    prints.add(prepare(data(path), renderer, seed=0).fingerprint)
    assert len(prints) == 5


def test_a_weight_of_a_validation_source_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    train, other = rows(tmp_path / "a.jsonl", ["1", "2"]), rows(tmp_path / "b.jsonl", ["8", "9"])
    with pytest.raises(DataError, match="has the weight 2") as caught:
        prepare(data(train, validation=[{"source": str(other), "weight": 2}]), renderer, seed=0)
    problem = caught.value.problems[0]
    assert (problem.where, problem.fix) == (str(other), "remove weight from validation sources")
    assert len(prepare(data(train, validation=[{"source": str(other), "weight": 1}]), renderer, seed=0).validation) == 2


def test_a_weight_that_rounds_a_source_away_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    paths = [rows(tmp_path / "a.jsonl", ["1", "2"]), rows(tmp_path / "b.jsonl", ["6", "7", "8", "9"])]

    def weighted(weight: float) -> Data:
        return Data.model_validate({"train": [{"source": str(paths[0])}, {"source": str(paths[1]), "weight": weight}], "max_tokens": 64})

    with pytest.raises(DataError, match=r"the weight 0\.1 of 4 training") as caught:
        prepare(weighted(0.1), renderer, seed=0)
    assert caught.value.problems[0].where == str(paths[1])
    assert caught.value.problems[0].fix
    assert len(prepare(weighted(0.25), renderer, seed=0).train) == 3


def test_a_training_source_without_rows_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    full, overlong, empty = rows(tmp_path / "a.jsonl", ["1"]), rows(tmp_path / "b.jsonl", ["x" * 300]), rows(tmp_path / "c.jsonl", [])
    for path in (overlong, empty):
        with pytest.raises(DataError, match="gives no row") as caught:
            prepare(data(full, path, overlong="drop"), renderer, seed=0)
        assert caught.value.problems[0].where == str(path)


def test_a_source_whose_rows_are_all_drawn_for_validation_is_accepted(tmp_path: Path, renderer: Renderer) -> None:
    many, one = rows(tmp_path / "a.jsonl", [str(n) for n in range(20)]), rows(tmp_path / "b.jsonl", ["only"])
    sides = [prepare(data(many, one, validation={"fraction": 0.4}), renderer, seed=seed) for seed in range(8)]
    assert any(example.where == f"{one}:1" for prepared in sides for example in prepared.validation)


def test_every_bad_row_is_found_and_nothing_is_cached(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    first, second = rows(tmp_path / "a.jsonl", ["fine", "x" * 300] * 3), rows(tmp_path / "b.jsonl", ["y" * 300] * 25)
    with first.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as caught:
        prepare(data(first, second), renderer, seed=0)
    places = [problem.where for problem in caught.value.problems]
    assert places[:5] == [*(f"{first}:{line}" for line in (2, 4, 6, 7)), f"{second}:1"]
    assert len(places) == 21
    assert caught.value.problems[-1].what == "... and 9 more bad rows"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_reading_stops_where_nearly_everything_is_bad(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", ["x" * 300] * 2500)
    with pytest.raises(DataError) as caught:
        prepare(data(path), renderer, seed=0)
    assert caught.value.problems[-1].what == "... and 980 more bad rows, as far as was read"


def test_a15_every_overlap_names_both_places(tmp_path: Path, renderer: Renderer) -> None:
    """Whatever the weights and however many files: an oversampled row in a second file is still found."""
    train = [rows(tmp_path / "a.jsonl", ["1", "2"]), rows(tmp_path / "b.jsonl", ["3", "3"])]
    other = rows(tmp_path / "v.jsonl", ["3", "7", "1"])
    sources = [{"source": str(path), "weight": 3} for path in train]
    settings = Data.model_validate({"train": sources, "validation": [{"source": str(other)}], "max_tokens": 64})
    with pytest.raises(DataError) as caught:
        prepare(settings, renderer, seed=0)
    assert [problem.where for problem in caught.value.problems] == [f"{other}:1 and {train[1]}:1", f"{other}:3 and {train[0]}:1"]


def test_duplicates_are_counted_dropped_or_refused(tmp_path: Path, renderer: Renderer) -> None:
    first, second = rows(tmp_path / "a.jsonl", ["1", "2", "1"]), rows(tmp_path / "b.jsonl", ["2", "3"])
    kept = prepare(data(first, second), renderer, seed=0)
    finding = kept.report.finding("duplicate rows")
    assert (len(kept.train), finding.count) == (5, 2)
    assert finding.places == (f"{first}:3 and {first}:1", f"{second}:1 and {first}:2")
    dropped = prepare(data(first, second, duplicates="drop"), renderer, seed=0)
    assert [example.where for example in dropped.train] == [f"{first}:1", f"{first}:2", f"{second}:2"]
    assert dropped.report.dropped == {"duplicate": 2}
    with pytest.raises(DataError, match="equal token by token") as caught:
        prepare(data(first, second, duplicates="error"), renderer, seed=0)
    assert [problem.where for problem in caught.value.problems] == list(finding.places)


LONG = (
    "in the first week of the study each patient of the second group kept a diary and was seen twice by the same doctor who did not "
    "know to which of the groups a patient belonged and both times the reading was above the limit that the guideline names for most adults"
)


def test_near_duplicates_are_counted_or_dropped(tmp_path: Path, renderer: Renderer) -> None:
    near = LONG.replace("adults", "children")
    path = rows(tmp_path / "a.jsonl", [LONG, "something else entirely that shares nothing with it", near, LONG.upper()])
    counted = prepare(data(path, max_tokens=1024), renderer, seed=0)
    finding = counted.report.finding("near-duplicate rows")
    assert len(counted.train) == 4
    assert (finding.count, finding.places) == (2, (f"{path}:3 and {path}:1", f"{path}:4 and {path}:1"))
    dropped = prepare(data(path, max_tokens=1024, near_duplicates="drop"), renderer, seed=0)
    assert [example.where for example in dropped.train] == [f"{path}:1", f"{path}:2"]
    assert not prepare(data(path, max_tokens=1024, near_duplicates="ignore"), renderer, seed=0).report.finding("near-duplicate rows").count


def test_a15_near_duplicates_over_the_border_are_reported(tmp_path: Path, renderer: Renderer) -> None:
    train, other = rows(tmp_path / "a.jsonl", ["1", LONG]), rows(tmp_path / "v.jsonl", ["9", LONG.replace("adults", "children")])
    prepared = prepare(data(train, validation=[{"source": str(other)}], max_tokens=1024), renderer, seed=0)
    finding = prepared.report.finding("validation rows near training rows")
    assert (finding.count, finding.places) == (1, (f"{other}:2 and {train}:2",))
    assert finding.advice


def test_a_shared_system_message_makes_no_near_duplicates(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for text in ("one thing about kidneys", "another about the liver", "a third on lungs"):
            roles = {"system": LONG, "user": text, "assistant": text}
            file.write(json.dumps({"messages": [{"role": role, "content": content} for role, content in roles.items()]}) + "\n")
    assert not prepare(data(path, max_tokens=1024), renderer, seed=0).report.finding("near-duplicate rows").count


def test_documents_are_cut_into_blocks_that_supervise_every_token_once(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    texts = [" ".join(f"word{number}" for number in range(count)) for count in (40, 3, 25)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(data(path), renderer, seed=0)
    wholes = prepare(data(path, max_tokens=4096), renderer, seed=0).train
    for line, whole in enumerate(wholes, start=1):
        blocks = [example for example in prepared.train if example.where.split(" ")[0] == f"{path}:{line}"]
        taught = [token for block in blocks for token, flag in zip(block.ids, block.mask, strict=True) if flag]
        assert tuple(taught) == whole.ids[1:]
        assert all(len(block.ids) <= 64 for block in blocks)
        assert all(left.ids[-1] == right.ids[0] for left, right in pairwise(blocks))
    assert prepared.report.sources[0].split == 2
    assert prepared.train.where(0) == f"{path}:1 block 1"
    assert prepared.train.where(len(prepared.train) - 1).startswith(f"{path}:3 block")


def test_pieces_of_a_document_land_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    texts = [" ".join(f"w{line}x{number}" for number in range(60)) for line in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(data(path, validation={"fraction": 0.4}), renderer, seed=3)
    sides = [{example.where.split(" ")[0] for example in side} for side in (prepared.train, prepared.validation)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_the_report_counts_by_source_and_survives_json(tmp_path: Path, renderer: Renderer) -> None:
    first, second = rows(tmp_path / "a.jsonl", ["1 and more", "x" * 300]), rows(tmp_path / "b.jsonl", ["2 and more"])
    report = prepare(data(first, second, overlong="drop"), renderer, seed=0).report
    assert [(source.rows, source.examples, source.over_long, source.dropped) for source in report.sources] == [(2, 1, 1, 1), (1, 1, 0, 0)]
    assert report.train.tokens == sum(source.tokens for source in report.sources)
    assert sum(report.train.histogram) == 2
    assert 0 < report.train.supervised_share < 1
    assert DataReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


# --- the cache -----------------------------------------------------------------------------------------------------------------------


class Watched:
    """Tells whether anything was prepared."""

    def __init__(self) -> None:
        self.stages: set[str] = set()

    def __call__(self, stage: str, done: int, of: int) -> None:
        assert 0 <= done <= of or not of
        self.stages.add(stage)


def prepared_anew(settings: Data, renderer: Renderer, seed: int = 0) -> bool:
    watched = Watched()
    prepare(settings, renderer, seed, watched)
    return bool(watched.stages)


def test_a_second_run_reads_the_cache(tmp_path: Path, renderer: Renderer) -> None:
    settings = data(rows(tmp_path / "a.jsonl", ["1", "2"]))
    assert prepared_anew(settings, renderer)
    assert not prepared_anew(settings, renderer)
    assert not prepared_anew(settings.model_copy(update={"processes": 1}), renderer)  # what changes nothing is no part of the key


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 65},
        {"supervise": "all"},
        {"overlong": "drop"},
        {"duplicates": "drop"},
        {"near_duplicates": "ignore"},
        {"validation": {"fraction": 0.4}},
    ],
)
def test_a9_every_option_is_part_of_the_key(tmp_path: Path, renderer: Renderer, change: dict[str, object]) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(20)])
    prepare(data(path), renderer, 0)
    assert prepared_anew(data(path, **change), renderer)


def test_a9_every_option_of_the_section_is_named_above() -> None:
    """A new option that changes the data must not be forgotten in the key: it is there without being listed, and tested above."""
    tested = {"max_tokens", "supervise", "overlong", "duplicates", "near_duplicates", "validation", "train"}
    assert set(Data.model_fields) - tested == {"processes"}


def test_a9_data_source_seed_tokenizer_template_and_code_are_part_of_the_key(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "a.jsonl", ["1", "2"])

    def fresh() -> Renderer:
        return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))

    prepare(data(path), fresh(), 0)
    assert not prepared_anew(data(path), fresh())
    assert prepared_anew(data(path), fresh(), seed=1)
    for change in ({"weight": 2.0}, {"format": "question-answer"}, {"columns": {"question": "question"}}):
        source = {"source": str(path), **change}
        assert prepared_anew(Data.model_validate({"train": [source], "max_tokens": 64}), fresh())
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert prepared_anew(data(copy), fresh())  # its places are others
    template, token, backend = fresh(), fresh(), fresh()
    template.tokenizer.chat_template = "{# changed #}" + template.tokenizer.chat_template
    token.tokenizer.add_tokens(["<new>"])
    backend.tokenizer.backend_tokenizer.no_padding()
    backend.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert prepared_anew(data(path), template)
    assert prepared_anew(data(path), token)
    assert prepared_anew(data(path), backend)
    rows(path, ["1", "3"])  # as many bytes, perhaps in the same tick of the clock
    assert prepared_anew(data(path), fresh())
    monkeypatch.setattr(key, "code_hash", lambda: "changed")
    assert prepared_anew(data(path), fresh())
    monkeypatch.setattr(key, "_LIBRARIES", ("tokenizers",))
    assert prepared_anew(data(path), fresh())


def test_a9_the_code_is_hashed() -> None:
    assert (Path(key.__file__).parent / "render.py").is_file()
    assert len(key.code_hash()) == 64


def test_a_damaged_entry_is_made_again(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    settings = data(rows(tmp_path / "a.jsonl", ["1", "2"]))
    fingerprint = prepare(settings, renderer, 0).fingerprint
    (stored,) = (tmp_path / "cache").rglob("rows.arrow")
    stored.write_bytes(stored.read_bytes()[:-20])
    assert prepared_anew(settings, renderer)
    assert prepare(settings, renderer, 0).fingerprint == fingerprint


def test_what_a_killed_process_left_is_removed(tmp_path: Path, renderer: Renderer) -> None:
    settings = data(rows(tmp_path / "a.jsonl", ["1", "2"]))
    left = cache_directory() / "prepared" / f".{key.prepared_key(settings, renderer, 0)}.1.tmp"
    left.mkdir(parents=True)
    (left / "rows.arrow").write_bytes(b"half")
    prepare(settings, renderer, 0)
    assert not left.exists()


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_ROWS", 7)
    path = rows(tmp_path / "a.jsonl", [str(n % 30) for n in range(60)])
    hashes = []
    for processes in (1, 2):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache{processes}"))
        prepare(data(path, validation={"fraction": 0.3}, processes=processes), renderer, 0)
        (manifest,) = (tmp_path / f"cache{processes}").rglob("MANIFEST.json")
        hashes.append(json.loads(manifest.read_text())["sha256"])
    assert hashes[0] == hashes[1]
    assert {"rows.arrow", "index.safetensors", "report.json"} == set(hashes[0])


def test_a9_data_that_changes_while_it_is_read_is_refused(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path = rows(tmp_path / "a.jsonl", ["old"])

    def change(*_: object) -> None:
        rows(path, ["new"])  # as many bytes, perhaps in the same tick of the clock

    with pytest.raises(DataError, match="changed while it was read") as caught:
        prepare(data(path), renderer, 0, change)
    assert caught.value.problems[0].where == str(path)
    assert not [left for left in (tmp_path / "cache").rglob("*") if left.is_file() and left.suffix != ".lock"]
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(data(path), renderer, 0, lambda *_: path.unlink(missing_ok=True))


def test_files_that_have_rested_are_hashed_once(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "a.jsonl", ["1", "2"])
    os.utime(path, (1e9, 1e9))
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return "0" * 64

    monkeypatch.setattr(key, "sha256_of", counted)
    prepare(data(path), renderer, 0)
    assert hashed == [path]


@pytest.mark.parametrize("weight", [0, -1, 1001, 1e15])
def test_a_weight_beyond_reason_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match=r"greater than 0|less than or equal to 1000"):
        Data.model_validate({"train": [{"source": "a.jsonl", "weight": weight}]})


def test_of_two_runs_at_once_one_prepares(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(500)])
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        "from finetune.config.schema import Data\n"
        "from finetune.data.prepare import prepare\n"
        "from finetune.data.render import Renderer\n"
        "stages = set()\n"
        "settings = Data.model_validate({'train': [{'source': sys.argv[1]}], 'max_tokens': 64, 'processes': 1})\n"
        "renderer = Renderer(AutoTokenizer.from_pretrained(sys.argv[2]))\n"
        "prepared = prepare(settings, renderer, 0, lambda stage, done, of: stages.add(stage))\n"
        "print(prepared.fingerprint, len(stages))\n"
    )
    environment = {**os.environ, "FINETUNE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(path), str(tiny_tokenizer_dir)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=120)[0].split() for process in both)
    assert answers[0][0] == answers[1][0]
    assert (answers[0][1], answers[1][1] != "0") == ("0", True)


def test_b10_a_tokenizer_that_has_used_its_threads_does_not_hang_the_workers(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(reading, "CHUNK_ROWS", 7)
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    renderer.tokenizer(["some text"] * 200)
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(40)])
    begun = time.monotonic()
    assert len(prepare(data(path, processes=2), renderer, 0).train) == 40
    assert time.monotonic() - begun < 60
