"""Where values came from is recorded with a run, and survives that it is resumed from its own config.yaml."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.config.dump import dump_config, leaves
from finetune.config.origins import record_origins, stored_leaves
from finetune.config.tree import dotted
from finetune.errors import ConfigError


def recorded(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "environment.json").read_text())["origins"]
    return found


def test_a_run_keeps_the_origin_of_each_value(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = write_config(train={"max_steps": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256})
    loaded = api.load_config(path, ["seed=3"])
    api.train(loaded.config, origins=loaded.origins)
    found = recorded(tmp_path / "run")
    assert found.keys() == {dotted(leaf) for leaf in leaves(loaded.config)}
    assert found["seed"] == {"value": 3, "origin": "override -o seed=3"}
    assert found["tuning.dropout"]["origin"] == "default"
    line = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if '"rank"' in text)
    assert found["tuning.rank"]["origin"].endswith(f"run.yaml:{line}")

    longer = api.load_config(tmp_path / "run" / "config.yaml", ["train.max_steps=3"])
    api.train(longer.config, resume=True, origins=longer.origins)
    again = recorded(tmp_path / "run")
    assert again["train.max_steps"] == {"value": 3, "origin": "override -o train.max_steps=3"}
    assert {key for key in found if again[key] != found[key]} == {"train.max_steps"}
    page = api.report(tmp_path / "run").read_text()
    assert "override -o train.max_steps=3" in page
    assert f"run.yaml:{line}" in page


def test_a_configuration_without_a_file_has_no_origins_but_those_it_had(write_config: Callable[..., Path]) -> None:
    config = api.load_config(write_config()).config
    assert record_origins(config, None, {}) == {}
    before = {"seed": {"value": config.seed, "origin": "a.yaml:1"}, "train.epochs": {"value": 99, "origin": "a.yaml:2"}}
    assert record_origins(config, None, before) == {"seed": before["seed"]}


def test_stored_values_are_those_of_the_configuration(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = api.load_config(write_config()).config
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert stored_leaves(tmp_path / "config.yaml") == {dotted(leaf): value for leaf, value in leaves(config).items()}
    (tmp_path / "config.yaml").write_text("key_of_another_version: 1\nmodel: {id: x}\n")
    assert stored_leaves(tmp_path / "config.yaml") == {"key_of_another_version": 1, "model.id": "x"}
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError):
        stored_leaves(tmp_path / "config.yaml")
