"""`finetune plan`: what it shows, at once and without torch; and what `finetune train` says and refuses before it begins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.cli import view
from finetune.cli.app import app
from finetune.cli.plan_command import short, show
from finetune.config.load import load_config
from finetune.errors import ConfigError
from finetune.hardware import Machine, survey
from finetune.planning.gpus import BY_SIZE
from finetune.planning.length import DataCounts
from finetune.planning.placement import machine_of_size
from finetune.planning.plan import Plan, make_plan
from finetune.training.forecast import forecast

ROOT = Path(__file__).parents[2]
Run = Callable[..., Any]
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """(*arguments, columns=80) -> what the command prints."""

    def run(*arguments: object, columns: int = 80) -> str:
        monkeypatch.setattr(view, "out", view.Console(highlight=False, width=columns))
        app(["plan", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return run


def shapes(folder: Path, **changes: object) -> Path:
    """A model directory that holds nothing but config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_70B | changes))
    return folder


def test_a_plan_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from finetune.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "plan", "configs/medical-70b.yaml", "--gpu", "48"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "does not fit" in run.stdout


@pytest.mark.parametrize("columns", [40, 80])
def test_a_change_is_one_line_that_can_be_copied(plan: Callable[..., str], columns: int) -> None:
    shown = plan("configs/medical-70b.yaml", "--gpu", "24", columns=columns).splitlines()
    options = [line for line in shown if line.startswith("  -")]
    assert len(options) == 1, shown
    assert re.fullmatch(r"(  ?-o \S+)+ --devices \d+", options[0])
    found = json.loads(plan("configs/medical-70b.yaml", "--gpu", "24", "--json"))["change"]
    assert re.findall(r"-o (\S+)", options[0]) == found["overrides"]
    told = [*short(api.plan(load_config(Path("configs/medical-70b.yaml")).config, gpu=24))]
    assert options[0].strip() in [line.strip() for text in told for line in view.wrapped(text, 4, columns).splitlines()]


@pytest.mark.parametrize("columns", [80, 200])
def test_the_plan_of_a_70b_on_one_screen(plan: Callable[..., str], columns: int) -> None:
    shown = plan("configs/medical-70b.yaml", "--gpu", "48", columns=columns)
    assert all(len(line.rstrip()) <= min(columns, 100) for line in shown.splitlines() if not line.startswith("  -o ")), shown
    assert len(shown.splitlines()) <= 60
    text = " ".join(shown.split())
    for expected in (
        "Meta-Llama-3-70B (70,553,706,496 parameters, nf4), lora",
        "attention 640 262,144,000 0.37% 1.0e-04",
        "together 1,122 837,107,712 1.17%",
        "memory of 1 x RTX A6000 (47.0 GiB)",
        "does not fit: ",
        "The smallest change: -o ",
        "finetune data stats configs/medical-70b.yaml",
        "an estimate",
    ):
        assert expected in text, shown
    assert re.search(r"^H200 +137\.6 +[\d.]+ +[\d,]+ +yes", shown, re.M), shown
    assert re.search(r"^RTX 3090 +23\.5 +[\d.]+ +[\d,]+ +no +$", shown, re.M), shown


def test_as_json_the_plan_is_for_programs(plan: Callable[..., str], tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"question": "What?", "answer": "That."}\n' * 100)
    config = tmp_path / "run.yaml"
    data = {"train": [{"source": str(rows)}]}
    model, tuning = {"id": "meta-llama/Llama-2-7b-hf"}, {"method": "lora", "targets": "attention"}
    config.write_text(json.dumps({"model": model, "tuning": tuning, "data": data, "train": {"batch_size": 8}, "output": "out"}))
    found = json.loads(plan(config, "--gpu", "80", "--devices", "2", "--tokens-per-second", "5000", "--json"))
    assert found["parameters"]["trainable"] == 16_777_216
    assert found["device"]["devices"] == 2
    assert found["speed"] == {"tokens_per_second": 5000, "origin": "stated", "reason": "--tokens-per-second"}
    assert found["length"]["data"]["rows"] == 100
    assert found["length"]["steps"] == {"per_epoch": 13, "total": 13, "warmup": 0}
    shown = plan(config, "--gpu", "80", "--devices", "2")
    assert "data: about 100 training and 0 validation rows (lines of 1 file" in shown
    assert "2 x H100" in shown


def test_every_refusal_of_a_plan_has_a_fix(call: Run, tmp_path: Path) -> None:
    known = "meta-llama/Llama-2-7b-hf"

    def write(model: str) -> Path:
        config = tmp_path / f"{len([*tmp_path.glob('*.yaml')])}.yaml"
        rest = {"tuning": {"method": "lora"}, "data": {"train": [{"source": "a.jsonl"}]}, "output": "out"}
        config.write_text(json.dumps({"model": {"id": model}, **rest}))
        return config

    mixture = shapes(tmp_path / "mixture", model_type="mixtral", num_local_experts=8)
    for arguments, expected in (
        ([write("nobody/unheard-of")], "hf download nobody/unheard-of config.json"),
        ([write(str(mixture))], "shapes are known of llama"),
        ([write(str(tmp_path / "nothing"))], "fix:"),
        ([write(known), "--gpu", "23"], "use one of 24 (RTX 4090)"),
        ([write(known), "-o", "tuning.targets=[nonsense_proj]"], "fix:"),
        ([write(known), "-o", "distributed.offload=true", "-o", "distributed.strategy=fsdp", "--devices", "2"], "fix:   remove it"),
        ([tmp_path / "missing.yaml"], "fix:"),
    ):
        done = call("plan", *arguments)
        assert done.code == 2, arguments
        assert expected in done.err, (arguments, done.err)


def test_a_plan_writes_nothing(call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    assert call("plan", "configs/quickstart.yaml").code == 0
    assert not [*tmp_path.iterdir()]


# --- before training -----------------------------------------------------------------------------------------------------------------


def test_the_short_form_has_four_lines_at_most() -> None:
    config = load_config(Path("configs/medical-70b.yaml")).config
    data = DataCounts(1000, 20, "prepared", exact=True, tokens=200_000, supervised=50_000, longest=400)
    lines = [*short(make_plan(config, Machine("cuda", "NVIDIA RTX A6000", 1, 44 * 2**30, bf16=True), data))]
    assert len(lines) == 4
    assert lines[0].startswith("Plan: 837,107,712 parameters train beside Meta-Llama-3-70B")
    assert lines[1].startswith("memory: about ")
    assert lines[2].startswith("this may not fit: The smallest change: -o ")
    assert "32 steps, 400,000 tokens" in lines[3]
    assert "kWh" in lines[3]
    assert (
        len([*short(make_plan(load_config(Path("configs/quickstart.yaml")).config, Machine("cpu", "a CPU", 2, 2**35, bf16=True), None))])
        == 2
    )


def test_training_tells_its_plan_first_and_keeps_it(finetune: Run, write_config: Callable[..., Path], tmp_path: Path) -> None:
    done = finetune("train", write_config(train={"max_steps": 1, "batch_size": 8, "precision": "fp32"}))
    assert done.code == 0, done.err
    assert done.err.startswith("Plan: ")
    assert done.err.index("Plan: ") < done.err.index("Training ")
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    counted, planned = kept["groups"], kept["plan"]
    assert planned["parameters"]["trainable"] == sum(group["parameters"] for group in counted)
    assert planned["length"]["data"]["exact"]
    assert planned["length"]["data"]["tokens"] == kept["data"]["train"]["tokens"]
    assert planned["length"]["steps"] == kept["steps"]
    assert planned["resolved"] == kept["resolved"]


def test_what_cannot_fit_is_refused_before_anything_is_read(finetune: Run, tmp_path: Path) -> None:
    model = shapes(tmp_path / "huge", num_hidden_layers=2, hidden_size=2**18, intermediate_size=2**20)
    config = tmp_path / "run.yaml"
    rest = {"tuning": {"method": "lora"}, "data": {"train": [{"source": str(tmp_path / "missing.jsonl")}]}, "output": str(tmp_path / "run")}
    config.write_text(json.dumps({"model": {"id": str(model)}, **rest}))
    done = finetune("train", config)
    assert done.code == 4, done.err
    assert "this run cannot fit" in done.err
    assert "fix:" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_a_model_whose_shapes_are_not_known_is_trained_without_a_plan(tmp_path: Path) -> None:
    model = shapes(tmp_path / "strange", model_type="strange")
    config = tmp_path / "run.yaml"
    rest = {"tuning": {"method": "lora"}, "data": {"train": [{"source": "a.jsonl"}]}, "output": "out"}
    config.write_text(json.dumps({"model": {"id": str(model)}, **rest}))
    event = forecast(load_config(config).config)
    assert event.plan is None
    assert "'strange' are not known" in event.reason


# --- the machine without torch -------------------------------------------------------------------------------------------------------


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0'\necho 'Tesla V100-SXM2-32GB, 32768, 7.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert survey() == Machine("cuda", "NVIDIA H100 80GB HBM3", 2, 81559 * 2**20, bf16=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert survey() == Machine("cuda", "Tesla V100-SXM2-32GB", 1, 32768 * 2**20, bf16=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    assert survey().devices == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert survey().kind == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for script in ("echo nonsense", "echo 'No devices were found'; exit 6", "echo 'NVIDIA X, [N/A], 9.0'"):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        assert survey().kind == "cpu", script


@pytest.mark.parametrize("size", ["48GB", "48GiB", "48 gb", "48"])
def test_a_size_of_gpu_may_have_its_unit(plan: Callable[..., str], size: str) -> None:
    assert "memory of 1 x RTX A6000" in plan("configs/quickstart.yaml", "--gpu", size)


@pytest.mark.parametrize("size", ["abc", "48TB", "-1", "4.8"])
def test_what_is_no_size_of_gpu_is_refused_with_those_that_are(call: Run, size: str) -> None:
    done = call("plan", "configs/quickstart.yaml", f"--gpu={size}")
    assert done.code == 2
    assert "no number of gigabytes" in done.err
    assert "use one of 24 (RTX 4090), 32 (RTX 5090)" in done.err


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("H100", "80 (H100), 48"), ("rtx 5090", "32 (RTX 5090), 24"), ("A100-80GB", "80 (H100)"), ("100", "80 (H100), 141 (H200)")],
)
def test_the_name_of_a_gpu_is_refused_with_its_size(call: Run, word: str, nearest: str) -> None:
    done = call("plan", "configs/quickstart.yaml", "--gpu", word)
    assert done.code == 2
    assert f"use one of {nearest}" in done.err
    assert all(f"{size} ({name})" in done.err for size, name in BY_SIZE.items())


def test_columns_of_which_nothing_is_known_are_left_out(plan: Callable[..., str]) -> None:
    shown = plan("configs/medical-70b.yaml", "--gpu", "48")
    heading = next(line for line in shown.splitlines() if line.startswith("on common GPUs"))
    assert heading.split()[3:] == ["GiB", "needed", "micro-batch", "fits", "tokens/s"]
    assert "energy" not in shown
    assert not re.search(r"^(RTX|A100|H\d).* yes +[\d,]+ +\S", shown, re.M)


def test_a_moment_and_a_trace_of_energy_are_not_shown_as_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataCounts(10, 0, "prepared", exact=True, tokens=500, supervised=100, longest=60)
    found = make_plan(load_config(Path("configs/quickstart.yaml")).config, machine_of_size(80), data)
    monkeypatch.setattr(view, "out", view.Console(highlight=False, width=80))
    show(found, "run.yaml")
    shown = capsys.readouterr().out
    assert re.search(r"^H100 .* yes +[\d,]+ +<1 s +<0.01$", shown, re.M), shown
    text = " ".join(shown.split())
    assert "<1 s without evaluations" in text
    assert "less than 0.01 kWh" in text
    assert not re.search(r"\b0 s|0\.00 kWh", shown)


def test_a_micro_batch_has_one_figure_before_and_after_the_data_is_read() -> None:
    """What a whole batch fills of it depends on the data, and is told beside it."""
    config = load_config(Path("configs/quickstart.yaml"), ["train.tokens_per_device=auto", "train.batch_size=8"]).config
    machine = Machine("cpu", "a CPU", 2, 2**35, bf16=True)
    small = DataCounts(100, 0, "prepared", exact=True, tokens=3000, supervised=1000, longest=32)
    long = DataCounts(100, 0, "prepared", exact=True, tokens=90_000, supervised=1000, longest=2000)
    assert _memory_line(make_plan(config, machine, None)).endswith("micro-batches of up to 1,024 tokens")
    assert _memory_line(make_plan(config, machine, small)).endswith("micro-batches of up to 1,024 tokens, of which a whole batch fills 256")
    assert _memory_line(make_plan(config, machine, long)).endswith("micro-batches of up to 1,024 tokens, but one example may have 2,000")


def _memory_line(plan: Plan) -> str:
    return [*short(plan)][1]


def test_an_unknown_size_of_gpu_is_a_configuration_error(plan: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="no common GPU has 1 GB"):
        plan("configs/quickstart.yaml", "--gpu", "1")
