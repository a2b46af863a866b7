"""Starts that move the base, starts from data and new tokens, through a whole run: resume, export, evaluation."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import api
from finetune.finished import load_run
from finetune.model.load import load_tokenizer
from finetune.model.tokens import enlarge, token_ids
from finetune.runs import open_run

Write = Callable[..., Path]
Train = Callable[..., Path]
TRAIN = {"epochs": 3, "batch_size": 4, "precision": "fp32", "tokens_per_device": 128, "checkpoint": {"every_steps": 4, "keep": 9}}
IDS = torch.arange(3, 60)[None]
NEW = torch.tensor([[320, 5, 321, 9, 320]])
LORA = {"method": "lora", "rank": 8, "alpha": 24, "scaling": "rslora", "rank_pattern": {"q_proj": 4}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def killed_after(run: Path, copy: Path, step: int) -> None:
    """``run`` as it would lie there had it been killed right after its checkpoint of ``step``."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


INITS = ({"method": "pissa"}, {"method": "olora"}, {"method": "eva", "rows": 7}, {"method": "orthogonal"})


@pytest.mark.parametrize("init", INITS, ids=lambda init: init["method"])
def test_a18_d1_a_run_resumes_bitwise_and_exports_a_plain_adapter(
    train_here: Train, write_config: Write, tmp_path: Path, tiny_model_dir: Path, init: dict[str, Any]
) -> None:
    settings = {"tuning": {**LORA, "init": init}, "train": TRAIN}
    run = train_here(write_config("a.yaml", **settings, output=str(tmp_path / "straight")))
    killed = tmp_path / "killed"
    killed_after(run, killed, 4)
    assert train_here(write_config("b.yaml", **settings, output=str(killed)), resume=True) == killed
    left, right = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, killed))
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    pristine = logits(base)
    plain = PeftModel.from_pretrained(base, run / "adapter")
    tuned = logits(plain)
    assert (tuned - pristine).abs().max() > 0.01
    with plain.disable_adapter():
        assert torch.equal(logits(plain), pristine)

    finished = load_run(open_run(run), api.load_config(run / "config.yaml").config)
    # fp64 judges: at a position that a start has made ill-conditioned, the plain adapter's own rounding is 2e-5
    exact = logits(copy.deepcopy(plain).double())
    rounding = float((tuned - exact).abs().max())
    assert rounding < 1e-4
    torch.testing.assert_close(logits(finished.model).double(), exact, rtol=0, atol=max(1e-5, rounding))
    model, using = finished.untrained()
    with using():
        torch.testing.assert_close(logits(model), pristine, rtol=0, atol=1e-5)
    # the exported adapter is as good as the model that was validated while it trained
    stored = json.loads((run / "adapter" / "training.json").read_text())["validation_loss"]
    assert finished.scorer(finished.model).mean_loss(finished.rows) == pytest.approx(stored, abs=1e-5)


@pytest.mark.parametrize(
    ("tuning", "tied"), [("new-tokens", True), ("new-tokens", False), ("full-embeddings", True), ("full", True)], ids=str
)
@pytest.mark.usefixtures("measured_here")
def test_a8_new_tokens_train_resume_and_reload(
    train_here: Train, write_config: Write, tmp_path: Path, make_tiny_model: Callable[..., Path], tuning: str, tied: bool
) -> None:
    base = make_tiny_model(tied=tied, seed=3)
    rows = tmp_path / "rows.jsonl"
    question = {"role": "user", "content": "[<dose>] of what?"}
    answers = ({"role": "assistant", "content": f"{number} of it [<note>]"} for number in range(12))
    rows.write_text("".join(json.dumps({"messages": [question, answer]}) + "\n" for answer in answers))
    lora = {"method": "lora", "rank": 4, "embeddings": tuning.removesuffix("-embeddings")}
    settings: dict[str, Any] = {
        "model": {"id": str(base), "new_tokens": ["[<note>]", "[<dose>]"]},
        "tuning": {"method": "full"} if tuning == "full" else lora,
        "data": {"train": [{"source": str(rows)}], "validation": {"fraction": 0.2}},
        "train": TRAIN | {"checkpoint": {"every_steps": 2, "keep": 9}},
    }
    run = train_here(write_config("a.yaml", **settings, output=str(tmp_path / "straight")))
    result = run / ("model" if tuning == "full" else "adapter")
    tokenizer = load_tokenizer(result)
    ids = token_ids(tokenizer, ("[<note>]", "[<dose>]"))
    assert ids == (320, 321)

    finished = load_run(open_run(run), api.load_config(run / "config.yaml").config)
    assert any(320 in row.ids and 321 in row.ids for row in finished.rows)
    stored = json.loads((result / "training.json").read_text())["validation_loss"]
    assert finished.scorer(finished.model).mean_loss(finished.rows) == pytest.approx(stored, abs=1e-5)
    pristine = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    enlarge(pristine, ids)
    model, using = finished.untrained()
    with using():
        torch.testing.assert_close(logits(model, NEW), logits(pristine, NEW), rtol=0, atol=1e-5)

    if tuning != "full":
        merged = api.merge(run, tmp_path / "merged", dtype="fp32").destination
        plain = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(logits(plain, NEW), logits(finished.model, NEW), rtol=0, atol=1e-5)
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
        assert len(plain.model.embed_tokens.weight) >= len(load_tokenizer(merged)) == 322

    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / result.name)
    for checkpoint in (killed / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 2:
            shutil.rmtree(checkpoint)
    train_here(write_config("b.yaml", **settings, output=str(killed)), resume=True)
    for file in result.glob("*.safetensors"):
        again = load_file(killed / result.name / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, again[name]), name
