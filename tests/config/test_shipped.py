"""Every YAML that ships is found by walking, loads, round-trips, and has an editor schema and generated docs that are fresh."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.dump import dump_config
from finetune.config.json_schema import config_schema, preset_schema
from finetune.config.load import load_config
from finetune.config.schema import Config, FourBit, LoftqInit, Lora
from finetune.config.shipped import config_names, find_config, find_recipe, recipes
from finetune.config.starter import starter
from finetune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))


def stated_keys(path: Path) -> set[str]:
    """The dotted keys that a file states, list items by number."""
    return set(_dotted(yaml.safe_load(path.read_text()), "")) - {"extends"}


def _dotted(value: Any, path: str) -> Any:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _dotted(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from _dotted(inner, f"{path}.{index}")
    elif path != "extends" and not path.startswith("extends."):
        yield path


def test_the_walk_finds_the_files():
    assert {path.stem for path in RECIPES} == {
        *("style", "instruction", "domain-knowledge", "code-math", "low-memory", "continued-pretraining", "small-data", "full")
    }
    assert {path.stem for path in CONFIGS} >= {
        *("medical-70b", "medical-70b-single-gpu", "medical-8b", "instruction-8b", "continued-pretraining-8b", "cpu-smoke")
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_each_of_its_keys_is_used(path: Path, load: Any):
    loaded = load_config(path)
    assert load(dump_config(loaded.config)).config == loaded.config
    for key in stated_keys(path):
        assert key in loaded.origins, key
        assert loaded.origins[key].where.startswith(f"configs/{path.name}:")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_under_the_least_config_and_each_of_its_keys_is_used(path: Path, load: Any):
    text = f"extends: {path.stem}\nmodel: {{id: owner/name}}\ndata: {{train: [{{source: /data/train.jsonl}}]}}\noutput: runs/test\n"
    loaded = load(text)
    assert load(dump_config(loaded.config)).config == loaded.config
    for key in stated_keys(path):
        assert loaded.origins[key].kind == "preset", key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_the_reason_of_its_numbers(path: Path):
    lines = path.read_text().splitlines()
    assert lines[1].startswith("# ")
    assert sum(" # " in line for line in lines) >= 2


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: path.stem)
def test_the_first_line_names_an_editor_schema_that_exists(path: Path):
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert found
    schema = json.loads((path.parent / found[1]).read_text())
    assert schema == (preset_schema() if path in RECIPES else config_schema())


def test_the_editor_schema_describes_every_key():
    text = json.dumps(config_schema())
    assert "Rank r of the update" in text
    assert config_schema()["then"]["required"] == [name for name, info in Config.model_fields.items() if info.is_required()]
    assert "required" not in json.dumps(preset_schema())
    for definition in config_schema()["$defs"].values():
        assert definition["additionalProperties"] is False


def test_medical_70b_is_the_run_of_the_mission():
    config = load_config(Path("configs/medical-70b.yaml")).config
    assert config.model.id == "meta-llama/Meta-Llama-3-70B"
    assert isinstance(config.quantization, FourBit)
    assert (config.quantization.method, config.quantization.double_quant) == ("nf4", True)
    assert isinstance(config.tuning, Lora)
    assert (config.tuning.rank, config.tuning.scaling, config.tuning.embeddings) == (64, "rslora", "lora")
    assert config.tuning.init == LoftqInit(method="loftq", iterations=1)
    assert config.optimizer.method == "paged-adamw-8bit"
    assert {name: group.lr_ratio for name, group in config.optimizer.groups.items()} == {"embeddings": 0.1, "attention": 1.0, "mlp": 2.0}


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("configs/cpu-smoke.yaml")).is_file()
    assert "configs/cpu-smoke.yaml" in config_names()
    assert find_recipe("style") is not None
    assert find_recipe("stile") is None
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cpu-smoke.yaml").write_text("mine")
    assert find_config(Path("configs/cpu-smoke.yaml")).read_text() == "mine"
    with pytest.raises(ConfigError, match=r"did you mean configs/cpu-smoke.yaml"):
        find_config(Path("configs/cpu-smok.yaml"))
    with pytest.raises(ConfigError, match="shipped configurations"):
        find_config(Path("nothing-like-it.yaml"))


def test_shipped_files_are_found_in_an_installed_package(tmp_path: Path):
    installed = tmp_path / "site-packages" / "finetune"
    shutil.copytree(ROOT / "finetune", installed, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("configs", "recipes"):  # as the wheel's force-include does
        shutil.copytree(ROOT / kind, installed / "shipped" / kind)
    code = "from finetune.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(installed.parent)}
    for arguments in (["config", "show", "configs/medical-70b.yaml", "--any-machine"], ["init", "mine.yaml", "--recipe", "style"]):
        command = [sys.executable, "-P", "-c", code, *arguments]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert "site-packages/finetune/shipped/configs/finetune.schema.json" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_has_a_summary_and_a_starter_that_loads(recipe: Any, load: Any):
    assert 20 < len(recipe.summary) < 120
    assert recipe.summary.endswith(".")
    loaded = load(starter(Path("mine.yaml"), recipe))
    assert loaded.config.model.id == "builtin:smollm2-135m"
    assert loaded.config.output == "runs/mine"


def test_the_generated_docs_and_schemas_are_fresh():
    run = subprocess.run([sys.executable, str(ROOT / "docs" / "build.py"), "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_config_reference_has_every_key():
    page = (ROOT / "docs" / "config.md").read_text()
    for name in ("loftq", "lora_plus_ratio", "tokens_per_device", "questions_per_fact", "builtin:icd10cm", "patience"):
        assert f"`{name}`" in page or f": {name}`" in page
    assert "| |\n" not in page.replace("| key | value | default | |\n", "")
