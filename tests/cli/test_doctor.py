"""`finetune doctor --machine`: what is there, what is not, and what that would give."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from finetune import inventory
from finetune.cli.app import app
from finetune.errors import ConfigError
from finetune.inventory import Part


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """(arguments) -> what the command prints on an 80-column terminal."""

    def run(*arguments: str) -> str:
        from finetune.cli import view

        monkeypatch.setattr(view, "out", view.Console(highlight=False, width=80))
        app(["doctor", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_a_machine_is_reported_as_json(doctor: Callable[..., str]) -> None:
    import torch

    found = json.loads(doctor("--machine", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert 0 < found["available_bytes"] <= found["memory_bytes"]
    assert {place["use"] for place in found["places"]} == {"runs", "cache", "models"}
    assert all(place["free_bytes"] > 0 for place in found["places"])
    assert "gloo" in found["collectives"]
    assert found["offline"] == "HF_HUB_OFFLINE"
    assert found["parts"]["gguf"]["version"] == metadata.version("gguf")


def test_the_hub_is_asked_unless_a_variable_says_no(doctor: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert json.loads(doctor("--machine", "--json"))["offline"] is None


def test_a_missing_part_says_what_it_would_give(doctor: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("crystal ball", "crystal-ball-of-nobody", "the loss of next week", "pip install crystal-ball")
    monkeypatch.setattr(inventory, "PARTS", (part,))
    shown = doctor("--machine")
    for text in ("crystal ball", "missing", "the loss of next week", "pip install crystal-ball"):
        assert text in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_a_driver_that_torch_does_not_use_is_told(doctor: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch uses the GPUs of this machine")
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(inventory, "_DRIVER", tmp_path / "version")
    problems = json.loads(doctor("--machine", "--json"))["problems"]
    assert len(problems) == 1
    assert torch.__version__ in problems[0]


def test_every_part_of_the_extras_is_known() -> None:
    """Against the package's own metadata: an extra that nobody explains is an extra that nobody installs."""
    extras = {"quickstart", "eval", "png", "tensorboard", "wandb", "mlflow", "trackio"}
    wanted = {
        requirement.split(";")[0].split(">")[0].split("=")[0].strip()
        for requirement in metadata.requires("finetune") or ()
        if any(f"extra == '{extra}'" in requirement or f'extra == "{extra}"' in requirement for extra in extras)
    }
    assert wanted
    assert wanted <= {part.distribution for part in inventory.PARTS}


def test_without_a_machine_it_says_what_it_can_do() -> None:
    with pytest.raises(ConfigError) as caught:
        app(["doctor"], standalone_mode=False)
    assert caught.value.exit_code == 2
    assert "--machine" in caught.value.problems[0].fix


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from finetune.cli.app import app
try:
    app(["doctor", "--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done: Any = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--machine" in done.stdout
