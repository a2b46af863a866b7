"""`finetune combine` from plan to directory: what it writes, what it refuses, and what is left where it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import api
from finetune.errors import ConfigError, VerificationError
from finetune.sealed import seal, verify

pytestmark = pytest.mark.usefixtures("measured_here")  # the commands of the first test measure in fresh processes

Run = Callable[..., Any]
Write = Callable[..., Path]
NF4 = {"method": "nf4"}
LOFTQ = {"method": "lora", "rank": 4, "init": {"method": "loftq"}}

# A process without this package: the logits of each model, or of each base with an adapter, on a few ids.
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = []
for base, adapter in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found.append(model.eval()(torch.arange(3, 60)[None]).logits[0, -1].tolist())
print(json.dumps(found))
assert "finetune" not in sys.modules
"""


def logits_elsewhere(*models: tuple[Path, Path | str]) -> torch.Tensor:
    """A row for each of ``models``: (a directory, that of an adapter or nothing)."""
    command = [sys.executable, "-P", "-c", ELSEWHERE, json.dumps([list(map(str, model)) for model in models])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return torch.tensor(json.loads(done.stdout))


@pytest.fixture
def train_two(write_config: Write, train_here: Run, tmp_path: Path) -> Callable[..., list[Path]]:
    """(first sections, second sections) -> two runs on one base."""

    def train(*each: dict[str, Any]) -> list[Path]:
        runs = []
        for sections in each:
            number = len(list(tmp_path.glob("run*.yaml")))
            runs.append(train_here(write_config(f"run{number}.yaml", output=str(tmp_path / f"run{number}"), seed=number, **sections)))
        return runs

    return train


def write_plan(folder: Path, runs: list[Path], weights: list[float] | None = None, **fields: Any) -> Path:
    entries: list[dict[str, Any]] = [{"path": str(run)} for run in runs]
    for entry, weight in zip(entries, weights or [], strict=bool(weights)):
        entry["weight"] = weight
    path = folder / "plan.yaml"
    path.write_text(json.dumps({"adapters": entries, **fields}))
    return path


def test_a_model_and_an_adapter_of_two_runs(train_two: Run, finetune: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    runs = train_two({}, {"tuning": {"method": "lora", "rank": 6, "scaling": "rslora", "targets": "attention"}})
    plan = write_plan(tmp_path, runs, [1.0, 0.5], method="task-arithmetic", output={"kind": "model", "dtype": "fp32"})
    done = finetune("combine", plan, "-O", tmp_path / "model")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'model'}\n"
    assert "validation rows of 2 runs" in done.err
    plan = write_plan(tmp_path, runs, [1.0, 0.5], method="task-arithmetic", output={"kind": "adapter", "rank": 10})
    done = finetune("combine", plan, "-O", tmp_path / "adapter", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["adapter"]["error"] < 1e-5
    assert set(record["adapter"]["errors"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model, adapter, base = logits_elsewhere((tmp_path / "model", ""), (tiny_model_dir, tmp_path / "adapter"), (tiny_model_dir, ""))
    assert float((model - adapter).abs().max()) < 1e-4
    assert float((model - base).abs().max()) > 0.01
    for folder in ("model", "adapter"):
        verify(tmp_path / folder)
        card = (tmp_path / folder / "README.md").read_text()
        assert "task-arithmetic with the weights 1, 0.5" in card.lower()
        assert len(AutoTokenizer.from_pretrained(tmp_path / folder)) == 320
    record = json.loads((tmp_path / "model" / "combine.json").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [1.0, 0.5]
    assert record["plan"]["method"] == "task-arithmetic"
    assert record["loss"]["written"] == pytest.approx(record["loss"]["combined"], abs=1e-4)
    # --force replaces a combination, and nothing else
    again = finetune("combine", plan, "-O", tmp_path / "model")
    assert (again.code, "not empty" in again.err) == (2, True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".model.{dead.pid}.tmp").mkdir()
    api.combine(plan, tmp_path / "model", force=True)
    assert not list(tmp_path.glob(".model.*")), "what a killed one left is swept"
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="something other"):
        api.combine(plan, tmp_path / "thesis", force=True)


def test_a6_runs_on_a_quantized_base_combine_on_what_they_were_trained_on(train_two: Run, tmp_path: Path) -> None:
    runs = train_two({"quantization": NF4}, {"quantization": NF4, "tuning": {"method": "lora", "rank": 2, "dora": True}})
    for run in runs:
        alone = write_plan(tmp_path, [run], method="task-arithmetic", output={"kind": "model", "dtype": "fp32"})
        report = api.combine(alone, tmp_path / f"alone-{run.name}")
        api.merge(run, tmp_path / f"merged-{run.name}", dtype="fp32")
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-{run.name}").state_dict() for kind in ("alone", "merged"))
        assert set(one) == set(other)
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert report.loss is not None
        assert report.loss.written < report.loss.base
    # an adapter of the quantized base is proven on a quantized base
    report = api.combine(write_plan(tmp_path, runs, method="average", output={"kind": "adapter", "rank": 12}), tmp_path / "adapter")
    assert report.adapter is not None
    assert "quantized as `nf4`" in (tmp_path / "adapter" / "README.md").read_text()
    report = api.combine(write_plan(tmp_path, runs, method="average", base={"weights": "original"}), tmp_path / "original")
    assert report.plan.base.weights == "original"


def test_an_adapter_that_was_combined_knows_its_base_and_how_that_was_quantized(
    train_two: Run, finetune: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    runs = train_two({"quantization": NF4}, {"quantization": NF4})
    plain = {"method": "none"}
    for name, base, quantization in (("on-nf4", {}, {**NF4, "double_quant": True}), ("on-original", {"weights": "original"}, plain)):
        plan = write_plan(tmp_path, runs, method="average", base=base, output={"kind": "adapter", "rank": 8})
        api.combine(plan, tmp_path / name)
        done = finetune("eval", tmp_path / name, "-o", "evaluation.tasks=[{task: forgetting}]", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert not any("does not record" in note for note in found["notes"])
        record = found["record"]["systems"]["tuned"]
        assert record["base"] == str(tiny_model_dir)
        assert record["quantization"].items() >= quantization.items()


def test_a18_loftq_runs_combine_from_where_they_began(train_two: Run, tmp_path: Path) -> None:
    """What the weights are is tested in tests/merging/test_combine.py; here, that a run brings its start along."""
    runs = train_two({"quantization": NF4, "tuning": LOFTQ}, {"quantization": NF4, "tuning": LOFTQ, "optimizer": {"learning_rate": 0.003}})
    report = api.combine(write_plan(tmp_path, runs, method="average"), tmp_path / "both")
    assert report.loss is not None
    assert report.loss.combined < report.loss.base
    with pytest.raises(ConfigError, match="LoftQ adapters belong to the quantized base"):
        api.combine(write_plan(tmp_path, runs, method="average", output={"kind": "adapter", "rank": 8}), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_runs_that_began_at_different_weights_are_added_on_the_original_ones_alone(train_two: Run, tmp_path: Path) -> None:
    runs = train_two({"quantization": NF4}, {})
    with pytest.raises(ConfigError, match="nf4 weights in float32") as caught:
        api.combine(write_plan(tmp_path, runs, method="average"), tmp_path / "out")
    assert "weights: original" in caught.value.problems[0].fix
    assert not (tmp_path / "out").exists()
    loftq = train_two({"quantization": NF4}, {"quantization": NF4, "tuning": LOFTQ})
    with pytest.raises(ConfigError, match="with a start of LoftQ"):
        api.combine(write_plan(tmp_path, loftq, method="average"), tmp_path / "out")


def test_a4_adapters_of_another_base_are_refused(train_two: Run, tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    other = make_tiny_model(seed=3)
    runs = train_two({}, {"model": {"id": str(other)}})
    with pytest.raises(ConfigError, match="another base") as caught:
        api.combine(write_plan(tmp_path, runs, method="average"), tmp_path / "out")
    assert str(runs[1]) in caught.value.problems[0].where
    with pytest.raises(ConfigError, match="another base"):
        api.combine(write_plan(tmp_path, runs[:1], method="average", base={"id": str(other)}), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "out"]


def test_damage_is_noticed_and_leaves_nothing(train_two: Run, finetune: Run, tmp_path: Path) -> None:
    runs = train_two({}, {})
    plan = write_plan(tmp_path, [*runs, runs[0]], method="ties", output={"kind": "model", "dtype": "bf16"})
    report = api.combine(plan, tmp_path / "twice")
    assert any("the same adapter" in note for note in report.notes)
    weights = runs[1] / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    done = finetune("combine", plan, "-O", tmp_path / "out")
    assert done.code == 6, done.err
    assert "adapter_model.safetensors" in done.err
    assert "Traceback" not in done.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "out"]


def test_b7_a_result_that_is_not_the_combination_is_not_kept(train_two: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.merging.combine_deltas import Combination

    runs = train_two({})
    plan = write_plan(tmp_path, runs, method="average", output={"kind": "model", "dtype": "fp32"})
    exact = Combination.weight

    def wrong(self: Combination, name: str, *, touched: bool) -> torch.Tensor:
        return exact(self, name, touched=touched and "layers.0" not in name)

    monkeypatch.setattr(Combination, "weight", wrong)
    with pytest.raises(VerificationError, match=r"layers\.0.*differs from the exact combination"):
        api.combine(plan, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "out"]


def test_adapters_without_a_run_need_a_base_and_say_what_is_assumed(train_two: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    (run,) = train_two({})
    shutil.copytree(run / "adapter", tmp_path / "copy")
    for name in ("training.json", "MANIFEST.json"):  # as of another tool
        (tmp_path / "copy" / name).unlink()
    with pytest.raises(ConfigError, match="the base is not known"):
        api.combine(write_plan(tmp_path, [tmp_path / "copy"], method="average"), tmp_path / "out")
    report = api.combine(write_plan(tmp_path, [tmp_path / "copy"], method="average", base={"id": str(tiny_model_dir)}), tmp_path / "out")
    assert any("nothing records its base" in note for note in report.notes)
    assert report.members.measured_on == "general text"
    inside = write_plan(tmp_path, [run / "adapter"], method="average", output={"kind": "model", "dtype": "fp32"})
    assert api.combine(inside, tmp_path / "inside").members.members[0].is_run


def test_a_copied_adapter_combines_on_the_base_that_it_records(train_two: Run, finetune: Run, tmp_path: Path) -> None:
    (run,) = train_two({"quantization": NF4})
    shutil.copytree(run / "adapter", tmp_path / "copy")
    output = {"kind": "model", "dtype": "fp32"}
    api.combine(write_plan(tmp_path, [run], method="average", output=output), tmp_path / "of-run")
    done = finetune("combine", write_plan(tmp_path, [tmp_path / "copy"], method="average", output=output), "-O", tmp_path / "of-copy")
    assert done.code == 0, done.err
    assert "nothing records" not in done.err
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("of-run", "of-copy"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    record = json.loads((tmp_path / "copy" / "training.json").read_text())
    for changed, sealed, code in (
        ({"fingerprint": "0" * 64}, False, 6),
        ({"fingerprint": "0" * 64}, True, 2),
        ({"dtype": "int3"}, True, 6),
    ):
        (tmp_path / "copy" / "training.json").write_text(json.dumps(record | {"base": record["base"] | changed}))
        if sealed:
            seal(tmp_path / "copy")
        done = finetune("combine", tmp_path / "plan.yaml", "-O", tmp_path / "other")
        assert done.code == code, done.err
        assert not (tmp_path / "other").exists()


def test_a8_new_tokens_must_be_the_same(train_two: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    model = {"id": str(tiny_model_dir), "new_tokens": ["<icd>", "<note>"]}
    tuning = {"method": "lora", "rank": 4, "embeddings": "new-tokens"}
    same = train_two({"model": model, "tuning": tuning}, {"model": model, "tuning": tuning})
    plan = write_plan(tmp_path, same, method="average", output={"kind": "model", "dtype": "fp32"})
    api.combine(plan, tmp_path / "out")
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(tokenizer) == 322
    other = train_two({})
    with pytest.raises(ConfigError, match="new tokens"):
        api.combine(write_plan(tmp_path, [same[0], *other], method="average"), tmp_path / "another")


def test_runs_that_change_no_weight_or_are_not_finished_are_refused(train_two: Run, finetune: Run, tmp_path: Path) -> None:
    runs = train_two({"tuning": {"method": "prompt"}}, {})
    with pytest.raises(ConfigError, match="changes no weight"):
        api.combine(write_plan(tmp_path, runs, method="average"), tmp_path / "out")
    shutil.rmtree(runs[1] / "adapter")
    with pytest.raises(ConfigError, match="not finished"):
        api.combine(write_plan(tmp_path, runs[1:], method="average"), tmp_path / "out")
    done = finetune("combine", write_plan(tmp_path, [tmp_path / "nowhere"], method="average"), "-O", tmp_path / "out")
    assert done.code == 2
    assert "there is no such directory" in done.err
    assert str(tmp_path / "nowhere") in done.err
