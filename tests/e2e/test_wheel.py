"""The installed wheel works from any directory: configurations, recipes, templates and texts are inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")  # built once, and not by every worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package as the wheel installs it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("finetune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "finetune", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_only_the_package_and_its_data(site: Path) -> None:
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"finetune"}
    names = {str(path.relative_to(site / "finetune")) for path in (site / "finetune").rglob("*")}
    assert {"shipped/configs/quickstart.yaml", "shipped/recipes/domain-knowledge.yaml", "reporting/report.html.j2"} <= names
    assert {"reporting/run.html.j2", "reporting/page.js", "reporting/page.css", "reporting/uplot/uPlot.iife.min.js"} <= names
    assert {"reporting/uplot/uPlot.min.css", "reporting/uplot/LICENSE"} <= names
    assert {"data/texts/general.txt", "data/texts/general_questions.json"} <= names


def test_it_finds_its_configurations_from_any_directory(site: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import finetune; print(finetune.__file__)"],
        env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in where.stdout
    for arguments in (["config", "check", "configs/quickstart.yaml"], ["config", "check", "configs/medical-70b.yaml"], ["init", "--list"]):
        done = run(site, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    assert run(site, tmp_path, "init", "my.yaml", "--recipe", "domain-knowledge").returncode == 0
    assert run(site, tmp_path, "config", "check", "my.yaml").returncode == 0


@pytest.mark.real
def test_it_reads_the_embedded_model_and_facts(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "data", "preview", "configs/quickstart.yaml", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert "[[" in done.stdout
