"""Export a run as a user does, and use what was written without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
Write = Callable[..., Path]

# Loads each directory with plain transformers (and PEFT); finetune cannot be imported.
USER = """
import json, sys
sys.modules["finetune"] = None
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, run_adapter, nf4, adapter = sys.argv[1:]
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

def quantized(path, **settings):
    model = AutoModelForCausalLM.from_pretrained(path, **settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model

found = {}
tokenizer = AutoTokenizer.from_pretrained(nf4)
question = [{"role": "user", "content": "What is it?"}]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
with torch.no_grad():
    trained = PeftModel.from_pretrained(quantized(base, dtype=torch.float32, quantization_config=settings), run_adapter).eval()(ids).logits
    exported = PeftModel.from_pretrained(quantized(base, dtype=torch.float32, quantization_config=settings), adapter).eval()(ids).logits
    model = quantized(nf4).eval()
    packed = model(ids).logits
    text = model.generate(ids, max_new_tokens=3, do_sample=False)
found["adapter"] = float((trained - exported).abs().max())
found["nf4"] = float((trained - packed).abs().max() / trained.std())
found["4 bit"] = model.is_loaded_in_4bit
found["ends"] = model.generation_config.eos_token_id
found["grew"] = text.shape[1] - ids.shape[1]
found["templates"] = [AutoTokenizer.from_pretrained(path).chat_template == tokenizer.chat_template for path in (adapter, run_adapter)]
found["cards"] = {name: ModelCard.load(f"{path}/README.md").data.to_dict() for name, path in (("nf4", nf4), ("adapter", adapter))}
print(json.dumps(found))
"""


def test_a_run_is_exported_and_used_without_this_package(
    finetune: Run, train_here: Run, write_config: Write, tmp_path: Path, tiny_model_dir: Path
) -> None:
    run = train_here(write_config(quantization={"method": "nf4"}, tuning={"method": "lora", "rank": 8, "alpha": 8, "scaling": "rslora"}))
    nf4, adapter = tmp_path / "nf4", tmp_path / "plain"
    done = finetune("merge", run, "-O", nf4, "--to", "nf4")
    assert done.code == 0, done.err
    assert done.out == f"{nf4}\n"
    assert "of the validation gain is kept" in done.err
    done = finetune("merge", run, "-O", adapter, "--to", "adapter", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["parity"]["max_logit_difference"] < 1e-4
    assert record["base"]["quantization"]["load_in_4bit"]
    assert json.loads((run / "export-adapter.json").read_text()) == record
    used = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", USER, *map(str, (tiny_model_dir, run / "adapter", nf4, adapter))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert used.returncode == 0, used.stderr[-3000:]
    found = json.loads(used.stdout)
    assert found["adapter"] < 1e-4
    assert 0 < found["nf4"] < 1
    assert found["4 bit"]
    assert found["ends"] == 2
    assert 1 <= found["grew"] <= 3
    assert found["templates"] == [True, True]
    assert found["cards"]["nf4"]["library_name"] == "transformers"
    assert found["cards"]["adapter"]["library_name"] == "peft"


def test_what_cannot_be_exported_writes_nothing(finetune: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = finetune("merge", tmp_path / "run", "-O", out, "--to", "gguf")
    assert done.code == 2, done.err
    said = " ".join(done.err.split())
    assert f"finetune merge {tmp_path / 'run'} -O {out}" in said.replace("│ ", "")
    assert "convert_hf_to_gguf.py" in said
    done = finetune("merge", tmp_path / "run", "-O", out, "--to", "nf4", "--rounding", "stochastic")
    assert done.code == 2, done.err
    assert "--rounding has no meaning with --to nf4" in done.err
    assert not list(tmp_path.iterdir())
