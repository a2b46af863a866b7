"""Train, merge and load elsewhere: plain transformers and PEFT in fresh processes agree with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.errors import ConfigError, VerificationError

Run = Callable[..., Any]
Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]

# Loads the adapter with PEFT and the merged directory with transformers, without finetune; prints how far their logits are apart.
# The flag is bitsandbytes' own: without it, 4-bit weights are repacked with loss on CPUs that have avx512_bf16.
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from peft import PeftModel
import bitsandbytes as bnb
base, adapter, merged, four_bit = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4 if four_bit == "nf4" else None)
for module in model.modules():
    if isinstance(module, bnb.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
ids = AutoTokenizer.from_pretrained(merged)("What is the official title of the disease?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    before = model.eval()(ids).logits
    adapted = PeftModel.from_pretrained(model, adapter).eval()(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    after = whole.float()(ids).logits
assert "finetune" not in sys.modules
largest = lambda difference: float(difference.abs().max() / adapted.std())
print(json.dumps({"trained": largest(adapted - before), "apart": largest(adapted - after), "dtype": str(whole.config.dtype)}))
"""


def elsewhere(base: Path, adapter: Path, merged: Path, quantization: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, str(base), str(adapter), str(merged), quantization],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a6_adapter_and_merged_model_agree_in_a_fresh_process(
    finetune: Run, train_here: Run, write_config: Write, tmp_path: Path, tiny_model_dir: Path
) -> None:
    config = write_config(quantization={"method": "nf4"}, tuning={"method": "lora", "rank": 8, "alpha": 8, "scaling": "rslora"})
    train_here(config)
    merged = tmp_path / "merged"
    done = finetune("merge", tmp_path / "run", "-O", merged, "--dtype", "fp32")
    assert done.code == 0, done.err
    assert done.out == f"{merged}\n"
    found = elsewhere(tiny_model_dir, tmp_path / "run" / "adapter", merged, "nf4")
    assert found["trained"] > 0.05
    assert found["apart"] < 1e-4
    assert found["dtype"] == "torch.float32"
    results = api.evaluate(tmp_path / "run", [merged])
    loss = next(figure.values for figure in results.figures if figure.name == "validation: loss")
    assert loss["tuned"] < loss["base"]
    assert loss["merged"] == pytest.approx(loss["tuned"], abs=1e-4)
    assert api.named_results(tmp_path / "run") == {"comparison.json": results}
    assert api.stored_results(tmp_path / "run") is None  # what the run's own settings find is another file
    assert api.places(tmp_path / "run")["merged model"] == merged


def test_a_merge_that_cannot_be_written_leaves_nothing(finetune: Run, train_here: Run, write_config: Write, tmp_path: Path) -> None:
    train_here(write_config())
    run, merged = tmp_path / "run", tmp_path / "merged"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError):
        api.merge(run, tmp_path / "taken", force=True)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "x"
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    for arguments in (("merge", run, "-O", merged), ("eval", run)):
        done = finetune(*arguments)
        assert done.code == 6, done.err
        assert "adapter_model.safetensors" in done.err
        assert "Traceback" not in done.err
    assert not merged.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("measured_here")
def test_evaluation_measures_what_was_trained(train_here: Run, write_config: Write, tmp_path: Path, chat_file: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(chat_file.read_text())
    run = train_here(write_config(data={"train": [{"source": str(data)}], "validation": {"fraction": 0.2}, "max_tokens": 256}))
    before = api.evaluate(run).figures
    data.unlink()  # the run directory is enough, here or on another machine
    assert api.evaluate(run).figures == before
    for override in ("quantization.method=nf4", "seed=1", "tuning.rank=32"):
        with pytest.raises(ConfigError, match="cannot be changed"):
            api.evaluate(run, overrides=[override])
    (tmp_path / "tuned").mkdir()
    api.merge(run, tmp_path / "tuned" / "base", dtype="fp32")
    with pytest.raises(ConfigError, match="two models are called 'base'"):
        api.evaluate(run, [tmp_path / "tuned" / "base"])


def test_a2_the_types_of_a_run_do_not_follow_the_machine(train_here: Run, write_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"epochs": 1, "batch_size": 8, "precision": "auto", "tokens_per_device": 256}
    run = train_here(write_config(train=settings, quantization={"method": "nf4"}))
    before = api.evaluate(run).figures
    here = json.loads((run / "environment.json").read_text())["machine"]["bf16"]
    monkeypatch.setattr("finetune.hardware._cpu_has_bf16", lambda: not here)
    assert api.evaluate(run).figures == before


def test_a4_another_base_of_the_same_shape_is_refused(
    train_here: Run, write_config: Write, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    base = make_tiny_model(seed=1)
    train_here(write_config(model={"id": str(base)}))
    other = make_tiny_model(seed=2)
    (base / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(VerificationError, match="not the one this run was trained on"):
        api.evaluate(tmp_path / "run")


def test_medical_70b_runs_in_full_on_a_small_model_of_its_architecture(
    finetune: Run, tmp_path: Path, make_tiny_model: Callable[..., Path], chat_file: Path
) -> None:
    """The mission's own configuration: NF4 with double quantization, rsLoRA, LoftQ, differential rates, paged 8-bit AdamW."""
    base = make_tiny_model(
        tied=False, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, rope_theta=500000.0
    )
    run, merged = tmp_path / "run", tmp_path / "merged"
    changes = {
        "model.id": base,
        "data.train.0.source": chat_file,
        "data.validation.fraction": 0.2,
        "train.batch_size": 4,
        "train.max_steps": 4,
        "train.precision": "fp32",
        "quantization.compute_dtype": "fp32",
        "output": run,
    }
    overrides = [part for key, value in changes.items() for part in ("-o", f"{key}={value}")]
    done = finetune("train", ROOT / "configs" / "medical-70b.yaml", "--devices", "2", *overrides)
    assert done.code == 0, done.err
    assert "LoftQ" in done.err
    plan = json.loads((run / "plan.json").read_text())
    assert plan["steps"]["total"] == 4
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["progress"]["step"] == 4
    rates = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["learning_rates"]
    assert len(rates) >= 3
    assert len(set(rates.values())) >= 3
    assert (run / "adapter" / "loftq_base.safetensors").is_file()
    done = finetune("merge", run, "-O", merged, "--dtype", "fp32")
    assert done.code == 0, done.err
    found = elsewhere(base, run / "adapter", merged, "nf4")
    assert found["apart"] < 1e-4
