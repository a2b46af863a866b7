"""Presets, the file and overrides: who wins, what is replaced, and where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Full, Lora, NoQuantization, ValidationSplit
from finetune.errors import ConfigError


@pytest.fixture
def presets(folder: Path) -> Path:
    (folder / "first.yaml").write_text(
        "tuning: {method: lora, rank: 64, init: {method: loftq, iterations: 3}}\n"
        "quantization: {method: nf4, double_quant: false}\n"
        "optimizer: {method: adamw-8bit, learning_rate: 3e-4, groups: {attention: {lr_ratio: 2}, mlp: {lr_ratio: 3}}}\n"
        "data: {validation: {fraction: 0.1}, max_tokens: 64}\n"
    )
    (folder / "second.yaml").write_text("tuning:\n  rank: 8\n  targets: [q_proj, v_proj]\nseed: 5\n")
    return folder


@pytest.mark.usefixtures("presets")
def test_mappings_merge_and_the_file_wins(minimal: str, load: Any):
    text = (
        minimal.replace("validation: {fraction: 0.1}", "max_tokens: 32")
        + "extends: [first.yaml, second.yaml]\noptimizer: {learning_rate: 1e-4}\n"
    )
    loaded = load(text)
    config = loaded.config
    assert isinstance(config.tuning, Lora)
    assert (config.tuning.rank, config.tuning.targets, config.tuning.init.method) == (8, ("q_proj", "v_proj"), "loftq")
    assert (config.optimizer.method, config.optimizer.learning_rate) == ("adamw-8bit", 1e-4)
    assert set(config.optimizer.groups) == {"attention", "mlp"}
    assert isinstance(config.data.validation, ValidationSplit)
    assert (config.data.max_tokens, config.seed) == (32, 5)


@pytest.mark.usefixtures("presets")
def test_the_order_of_presets_decides(minimal: str, load: Any):
    assert load(minimal + "extends: [second.yaml, first.yaml]\n").config.tuning.rank == 64
    assert load(minimal + "extends: [first.yaml, second.yaml]\n").config.tuning.rank == 8


@pytest.mark.usefixtures("presets")
def test_layers_merge_left_to_right_also_where_a_union_changes_twice(presets: Path, minimal: str, load: Any):
    (presets / "full.yaml").write_text("tuning: {method: full}\n")
    config = load(minimal + "extends: [first.yaml, full.yaml]\nquantization: {method: none}\n").config
    assert config.tuning == Lora(method="lora")  # nothing of first.yaml's rank comes back through full.yaml


@pytest.mark.usefixtures("presets")
def test_a_name_that_a_preset_chose_is_removed_with_null(minimal: str, load: Any, problems: Any):
    base = minimal + "extends: first.yaml\n"
    assert set(load(base + "optimizer: {groups: {mlp: null}}\n").config.optimizer.groups) == {"attention"}
    assert load(base, "optimizer.groups.mlp=null", "optimizer.groups.attention=null").config.optimizer.groups == {}
    (problem,) = problems(minimal, "optimizer.groups.mlp=null")  # there is nothing to remove
    assert "`optimizer.groups.mlp` has nothing under it" in problem.what


def test_lists_are_replaced(minimal: str, load: Any):
    text = minimal.replace("{method: lora}", "{method: lora, targets: [k_proj]}") + "extends: second.yaml\n"
    assert load(text).config.tuning.targets == ("k_proj",)


@pytest.mark.usefixtures("presets")
def test_a_union_that_changes_its_member_takes_no_field_of_the_other(minimal: str, load: Any):
    text = minimal.replace("{method: lora}", "{method: full}") + "extends: first.yaml\nquantization: {method: none}\n"
    config = load(text).config
    assert config.tuning == Full(method="full")
    assert config.quantization == NoQuantization()
    assert config.optimizer.method == "adamw-8bit"  # an optimizer's method is no union: the other fields stay
    assert load(minimal + "extends: first.yaml\noptimizer: {method: adamw}\n").config.optimizer.learning_rate == 3e-4


@pytest.mark.usefixtures("presets")
def test_the_two_words_of_one_member_share_their_fields(minimal: str, load: Any):
    assert load(minimal + "extends: first.yaml\nquantization: {method: fp4}\n").config.quantization.double_quant is False


@pytest.mark.usefixtures("presets")
def test_a_split_is_replaced_by_a_list_of_sources(minimal: str, load: Any):
    text = minimal.replace("{fraction: 0.1}", "[{source: /data/held-out.jsonl}]") + "extends: first.yaml\n"
    assert load(text).config.data.validation[0].source == "/data/held-out.jsonl"


def test_errors_point_into_the_preset(folder: Path, minimal: str, problems: Any):
    (folder / "wrong.yaml").write_text("seed: 1\ntrain: {epochs: 0}\n")
    (problem,) = problems(minimal + "extends: wrong.yaml\n")
    assert problem.where.endswith("wrong.yaml:2:17")
    assert "epochs: 0" in problem.excerpt


def test_a_preset_that_extends_is_refused(folder: Path, minimal: str, problems: Any):
    (folder / "deep.yaml").write_text("extends: style\n")
    (problem,) = problems(minimal + "extends: deep.yaml\n")
    assert "one level deep" in problem.what
    assert "deep.yaml:1:1" in problem.where


# --- overrides -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("tuning.rank=32", "tuning.rank", 32),
        ("optimizer.learning_rate=1e-5", "optimizer.learning_rate", 1e-5),
        ("tuning.targets=[q_proj, k_proj]", "tuning.targets", ("q_proj", "k_proj")),
        ("data.train.0.weight=2", "data.train", None),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.early_stopping={patience: 1}", "train.early_stopping.patience", 1),
        ("data.validation.fraction=0.25", "data.validation.fraction", 0.25),
        ("tracking.wandb=true", "tracking.wandb", True),
    ],
)
def test_overrides_replace_one_value(override: str, path: str, value: Any, minimal: str, load: Any):
    loaded = load(minimal, override)
    found: Any = loaded.config
    for key in path.split("."):
        found = getattr(found, key)
    if path == "data.train":
        assert found[0].weight == 2.0
    else:
        assert found == value
    assert {str(origin) for origin in loaded.origins.values() if origin.kind == "override"} == {f"override -o {override}"}


def test_an_override_of_a_union_replaces_it(minimal: str, load: Any):
    text = minimal.replace("{method: lora}", "{method: lora, rank: 8}")
    assert load(text, "tuning.method=full").config.tuning == Full(method="full")


def test_a_key_with_a_dot_is_quoted(minimal: str, load: Any):
    loaded = load(minimal, r'optimizer.groups."layers\.1\.".lr_ratio=0.5')
    assert loaded.config.optimizer.groups[r"layers\.1\."].lr_ratio == 0.5
    assert any('groups."layers' in path for path in loaded.origins)


# --- origins and paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("presets")
def test_every_value_knows_its_origin(minimal: str, load: Any):
    origins = load(minimal + "extends: first.yaml\n", "seed=3").origins
    assert str(origins["seed"]) == "override -o seed=3"
    assert origins["tuning.rank"].kind == "preset"
    assert origins["tuning.rank"].where.endswith("first.yaml:1")
    assert origins["tuning.method"].where.endswith("config.yaml:2")
    assert str(origins["train.epochs"]) == "default"
    assert "extends" not in origins


def test_relative_paths_start_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "sources.yaml").write_text("data: {validation: [{source: held/out.jsonl}]}\n")
    path = tmp_path / "config.yaml"
    path.write_text(
        "extends: presets/sources.yaml\nmodel: {id: ./model}\ntuning: {method: lora}\n"
        "data:\n  train:\n    - {source: '../rows/*.jsonl'}\n    - {source: 'builtin:icd10cm'}\noutput: runs/test\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path).config
    assert config.model.id == str(tmp_path / "model")
    assert [source.source for source in config.data.train] == [str(tmp_path.parent / "rows" / "*.jsonl"), "builtin:icd10cm"]
    assert config.data.validation[0].source == str(tmp_path / "presets" / "held" / "out.jsonl")
    assert config.output == "runs/test"
    overridden = load_config(path, ["data.train.0.source=mine.jsonl", "model.id=../other"]).config
    assert overridden.data.train[0].source == str(tmp_path / "elsewhere" / "mine.jsonl")
    assert overridden.model.id == str(tmp_path / "other")


def test_a_hub_id_is_not_a_directory(minimal: str, load: Any):
    assert load(minimal).config.model.id == "owner/name"


@pytest.mark.parametrize("name", ["missing.yaml", "configs/medcal-8b.yaml"])
def test_a_missing_file_is_a_config_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(Path(name))
    assert "there is no such file" in str(caught.value)
    assert "configs/medical-8b.yaml" in str(caught.value)


def test_a_directory_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="this is a directory"):
        load_config(tmp_path)
