"""What can be measured, side by side: runs, adapters without their run, directories; and what is no adapter of its base (pitfall A4)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import api
from finetune.errors import ConfigError, VerificationError
from finetune.evaluation.items import read_items
from finetune.evaluation.results import Results, read_results
from finetune.evaluation.targets import column_names, find_targets
from finetune.runs import RunDirectory
from finetune.sealed import seal

FORGETTING = "evaluation.tasks=[{task: forgetting}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path) -> Path:
    """A finished run on an NF4 base that nobody changes."""
    folder = tmp_path_factory.mktemp("trained")
    config = {
        "model": {"id": str(tiny_model_dir)},
        "quantization": {"method": "nf4"},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
        "optimizer": {"learning_rate": 0.02},
        "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256},
        "output": str(folder / "first"),
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    return api.train(api.load_config(folder / "run.yaml").config).path


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """The run's adapter, elsewhere."""
    return shutil.copytree(run / "adapter", tmp_path / "moved")


def value(results: Results, name: str, system: str) -> float:
    return next(figure.values[system] for figure in results.figures if figure.name == name)


# --- words ---------------------------------------------------------------------------------------------------------------------------


def test_words_are_told_apart(run: Path, adapter: Path, tiny_model_dir: Path) -> None:
    commit = "a" * 40
    targets = find_targets([run, adapter, tiny_model_dir, f"owner/name@{commit}", "builtin:smollm2-135m"])
    assert [target.kind for target in targets] == ["run", "adapter", "model", "model", "model"]
    assert [target.name for target in targets] == ["first", "moved", tiny_model_dir.name, "name", "smollm2-135m"]
    assert (targets[3].model_id, targets[3].revision) == ("owner/name", commit)
    assert column_names(targets[:1]) == {str(run): "tuned"}
    assert column_names(targets[:2])[str(run)] == "first"
    assert find_targets([run / "adapter"])[0].kind == "run"


def test_targets_of_one_name_are_told_apart_by_where_they_are(run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(tiny_model_dir, tmp_path / "merged" / run.name)
    again = shutil.copytree(run, tmp_path / "again" / run.name)
    assert list(column_names(find_targets([run, merged])).values()) == ["tuned", "merged/first"]
    assert list(column_names(find_targets([run, merged, again])).values()) == [f"{run.parent.name}/first", "merged/first", "again/first"]
    assert list(column_names(find_targets(["one/model", "other/model", tiny_model_dir])).values())[:2] == ["one/model", "other/model"]


def test_a_word_that_is_no_model_is_told_before_any_is_measured(run: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.chdir(run.parent)

    def measured(*_: object) -> None:
        raise AssertionError("a model was measured")

    for word, said, fix in (
        ("bogus", "is no directory here, and no model", "name a run"),
        ("frist", "is no directory here, and no model", "did you mean first?"),
        ("some-owner/no-such-model", "no copy in the hub's cache", "hf download some-owner/no-such-model"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            api.evaluate(tiny_model_dir, [word], progress=measured)
        problem = caught.value.problems[0]
        assert problem.where == word
        assert fix in problem.fix
        assert "model.id" not in f"{problem.what} {problem.fix}"


@pytest.mark.parametrize("word", ["run.yaml", "frist", "no/such/thing", "owner/name@main", "../nowhere"])
def test_what_is_no_target_is_told_with_what_would_be(run: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(run.parent)
    if word == "frist":
        word = str(run.with_name(word))
    with pytest.raises(ConfigError) as caught:
        find_targets([word])
    problem = caught.value.problems[0]
    assert word in problem.where
    assert problem.fix
    assert "first" in problem.fix if "frist" in word else True


def test_a_target_is_named_once(run: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        api.evaluate(run, [run])


# --- side by side --------------------------------------------------------------------------------------------------------------------


def test_an_adapter_without_its_run_is_measured_as_in_it(run: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = api.evaluate(run, overrides=[FORGETTING])
    alone = api.evaluate(adapter)
    assert alone.systems == ("base", "tuned")
    for system in alone.systems:
        name = "general text: loss"
        assert value(alone, name, system) == pytest.approx(value(inside, name, system), abs=1e-5)
    assert any("validation loss is not measured" in note for note in alone.notes)
    kept = json.loads((tmp_path / "eval" / "moved.json").read_text())
    assert kept["record"]["systems"]["tuned"]["base_fingerprint"] == inside.record["systems"]["tuned"]["base_fingerprint"]
    assert kept["record"]["systems"]["tuned"]["quantization"]["method"] == "nf4"
    assert kept["record"]["evaluation"]["tasks"]


def test_models_share_the_rows_of_the_run_and_bases_that_are_equal_are_one(run: Path, adapter: Path, tiny_model_dir: Path) -> None:
    results = api.evaluate(tiny_model_dir, [run, adapter], name="together")
    kept = read_items(Path(results.record["kept"]))
    summed = {(one.name, name): one.value for systems in kept.values() for name, found in systems.items() for one in found.quantities}
    shown = {(one.name, name): value for one in results.figures for name, value in one.values.items()}
    assert summed == pytest.approx(shown)
    assert results.systems == ("base", tiny_model_dir.name, "first", "moved")
    assert value(results, "validation: loss", "first") == pytest.approx(value(results, "validation: loss", "moved"), abs=1e-5)
    assert value(results, "validation: loss", "base") != value(results, "validation: loss", tiny_model_dir.name)  # NF4, and not
    assert (run / "eval" / "together.json").is_file()
    figure = next(figure for figure in results.figures if figure.name == "validation: loss")
    assert set(figure.changes) == {tiny_model_dir.name, "first", "moved"}


def test_runs_of_two_bases_are_each_compared_with_their_own_and_with_one_another(run: Path, tmp_path: Path) -> None:
    changes = ["quantization.method=none", f"output={tmp_path / 'plain'}"]
    other = api.train(api.load_config(run / "config.yaml", changes).config).path
    results = api.evaluate(run, [other], overrides=[FORGETTING], name="bases")
    assert results.systems == ("base", "base of plain", "first", "plain")
    assert results.bases == {"first": "base", "plain": "base of plain"}
    assert "each trained model is compared with its own base: changes of plain from base of plain, all others from base" in results.notes
    figure = next(one for one in results.figures if one.name == "general text: loss")
    assert figure.changes["plain"].difference == pytest.approx(figure.values["plain"] - figure.values["base of plain"])
    assert figure.changes["first"].difference == pytest.approx(figure.values["first"] - figure.values["base"])
    assert figure.between.keys() == {"plain"}
    assert figure.between["plain"].difference == pytest.approx(figure.values["plain"] - figure.values["first"])
    assert read_results(RunDirectory(run), "bases.json") == results


@pytest.mark.usefixtures("measured_here")
def test_adapter_and_merged_model_are_measured_alike_and_their_base_apart(run: Path, adapter: Path, tmp_path: Path) -> None:
    report = api.merge(run, tmp_path / "merged", dtype="fp32")
    assert report.dtype == "fp32"
    tasks = "evaluation.tasks=[{task: loss}, {task: forgetting}]"
    results = api.evaluate(run, [adapter, tmp_path / "merged"], overrides=[tasks], name="all")
    assert results.systems == ("base", "first", "moved", "merged")
    for figure in results.figures:
        assert figure.values["moved"] == pytest.approx(figure.values["first"], rel=1e-6)
        assert figure.values["merged"] == pytest.approx(figure.values["first"], rel=1e-4)
    general = next(figure for figure in results.figures if figure.name == "general text: loss")
    assert general.intervals.keys() == set(results.systems)
    change = general.changes["first"]
    assert change.low is not None
    assert change.high is not None
    assert not change.low <= 0 <= change.high


def test_full_tuning_that_changed_nothing_is_measured_as_no_change_in_bf16(tiny_model_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    config = {
        "model": {"id": str(tiny_model_dir)},
        "tuning": {"method": "full"},
        "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0},
        "data": {"train": [{"source": str(chat_file)}], "max_tokens": 256},
        "train": {"max_steps": 1, "batch_size": 4, "precision": "bf16", "tokens_per_device": 256},
        "output": str(tmp_path / "full"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    trained = api.train(api.load_config(tmp_path / "run.yaml").config).path
    results = api.evaluate(trained, overrides=[FORGETTING])
    before, after = (value(results, "general text: loss", system) for system in results.systems)
    assert after == before


def test_a_plain_model_alone_has_no_base(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = api.evaluate(tiny_model_dir, overrides=[FORGETTING, "evaluation.precision=fp32"])
    assert results.systems == (tiny_model_dir.name,)
    assert results.record["systems"][tiny_model_dir.name]["computed_in"] == {"precision": "fp32"}
    with pytest.raises(ConfigError, match="`loss` has no rows"):
        api.evaluate(tiny_model_dir, overrides=["evaluation.tasks=[{task: loss}]"])
    with pytest.raises(ConfigError, match="asks about the facts of a run"):
        api.evaluate(tiny_model_dir, overrides=["evaluation.tasks=[{task: knowledge}]"])
    with pytest.raises(ConfigError, match="--base is for adapter"):
        api.evaluate(tiny_model_dir, base="owner/name")


def test_rows_are_not_read_with_another_tokenizer(run: Path, make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    other = shutil.copytree(make_tiny_model(), tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    first, second = [token for token, number in settings["model"]["vocab"].items() if number in (100, 101)]
    vocabulary = settings["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="another tokenizer"):
        api.evaluate(run, [other])


def test_a_file_says_what_is_measured(run: Path, tmp_path: Path, chat_file: Path) -> None:
    shutil.copy(chat_file, tmp_path / "own.jsonl")
    config = tmp_path / "own-eval.yaml"
    config.write_text(
        "evaluation:\n  samples: 1\n  tasks:\n  - {task: loss, name: own, data: {source: own.jsonl}}\n  - task: generate\n"
        "    data: {source: own.jsonl}\n    max_new_tokens: 4\n"
    )
    results = api.evaluate(run, settings=config)
    assert [figure.name for figure in results.figures] == [
        "own: loss", "own: perplexity", "generate: exact match", "generate: token F1", "generate: ended by itself",
    ]  # fmt: skip
    assert len(results.samples) == 1
    assert set(results.samples[0].answers) == {"base", "tuned"}
    kept = json.loads((run / "eval" / "own-eval.json").read_text())
    assert list(kept["record"]["data"]["own"]["sha256"]) == [str(tmp_path / "own.jsonl")]
    again = api.evaluate(run, settings=config, overrides=["evaluation.tasks.0.name=mine", "evaluation.tokens_per_device=64"], name="again")
    assert again.figures[0].name == "mine: loss"
    assert again.figures[0].values == pytest.approx(results.figures[0].values, abs=1e-5)


# --- A4: adapters that are not what they claim ---------------------------------------------------------------------------------------


def rewritten(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], *, sealed: bool) -> Path:
    """The adapter with other tensors; ``sealed``: with a manifest that agrees, else with none, as another tool leaves it."""
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    (adapter / "MANIFEST.json").unlink()
    if sealed:
        seal(adapter)
    return adapter


def test_a4_renamed_tensors_are_refused(adapter: Path) -> None:
    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}

    with pytest.raises(VerificationError, match=r"missing|not used"):
        api.evaluate(rewritten(adapter, renamed, sealed=True))


def test_a4_another_base_of_the_same_shape_is_refused(adapter: Path, make_tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(VerificationError, match="not the one this adapter was trained on"):
        api.evaluate(adapter, base=str(make_tiny_model(seed=5)))


def test_a4_a_flipped_bit_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors is not the file that was saved"):
        api.evaluate(adapter)


def test_a4_half_of_it_zero_is_refused_by_its_manifest_and_all_of_it_by_its_effect(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * (number % 2) for number, (name, tensor) in enumerate(sorted(tensors.items()))}, path, {"format": "pt"})
    with pytest.raises(VerificationError, match="is not the file that was saved"):
        api.evaluate(adapter)

    def without_effect(found: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in found.items()}

    with pytest.raises(VerificationError, match="the adapter changes nothing"):
        api.evaluate(rewritten(adapter, without_effect, sealed=False))


def test_an_adapter_of_another_tool_needs_its_base_and_says_what_is_not_known(
    adapter: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / "training.json").unlink()
    (adapter / "MANIFEST.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not say what its base is"):
        api.evaluate(adapter)
    with pytest.raises(ConfigError, match="cannot be had"):
        api.evaluate(adapter, base="/nowhere/base")
    results = api.evaluate(adapter, base=str(tiny_model_dir))
    assert any("does not record which weights" in note for note in results.notes)
