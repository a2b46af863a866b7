"""Every method that can be merged, on every kind of base: plain transformers computes from the merged directory what PEFT computes from
base and adapter. Both are measured in one fresh process in which this package cannot be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from finetune.config.schema import FourBit, LoftqInit, NoQuantization, PissaInit, Tuning
from finetune.merging.fold import fold
from finetune.merging.inputs import MergeSource
from finetune.model.adapters import attach, save
from finetune.model.loftq import Quantizer, apply_loftq, save_base_correction
from finetune.model.methods import Given
from finetune.model.pissa import apply_moved, save_plain
from finetune.model.tokens import enlarge
from tests.merging.conftest import load_base, randomize, write_llama
from tests.merging.test_methods import NEW, write_biased

LORA = {"method": "lora", "rank": 4, "alpha": 8}
LORAS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "patterns": LORA | {"rank_pattern": {"q_proj": 2, r"layers\.1\.": 6}, "alpha_pattern": {"down_proj": 32}},
    "attention": LORA | {"targets": "attention"},
    "embeddings-lora": LORA | {"embeddings": "lora"},
    "embeddings-full": LORA | {"embeddings": "full"},
    "new-tokens": LORA | {"embeddings": "new-tokens"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "rslora": LORA | {"scaling": "rslora"},
    "dora": LORA | {"dora": True},
    "pissa": LORA | {"init": {"method": "pissa"}},
    "tied-lora": {"method": "tied-lora", "rank": 4, "alpha": 8},
    "adalora": {"method": "adalora", "rank": 3, "init_rank": 5, "alpha": 64},
    "vera": {"method": "vera", "rank": 16, "d_initial": 0.5},
    "ia3": {"method": "ia3"},
    "norm": {"method": "norm"},
    "bitfit": {"method": "bitfit"},
}
COLUMNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "nf4": {},
    "nf4+loftq": {"init": {"method": "loftq"}},
    "nf4+rslora+dora": {"scaling": "rslora", "dora": True},
}
CASES = [
    (method, column, tied)
    for method in LORAS | OTHERS
    for column in COLUMNS
    for tied in (False, True)
    # only LoRA has an init, a scaling and DoRA; PiSSA takes a part out of weights that are not quantized
    if (method in LORAS or not COLUMNS[column]) and (method, column) != ("pissa", "nf4")
]
LIMIT = 1e-4
"""Largest difference of a logit in fp32: the order of sums."""
BF16_LIMIT, BF16_KL_LIMIT = 0.25, 1e-3
"""The same where weights and products are rounded to bf16, in another order on either side, and nats a token. Measured over the 30 cases:
at most 0.141, of logits whose standard deviation is 1.2, and 2.7e-4 nats."""

# Plain transformers and PEFT. The flag is bitsandbytes' own: without it, CPUs with avx512_bf16 repack 4-bit weights with loss. PEFT has no
# bitfit: its biases are put in by hand.
FRESH = """
import json, sys
sys.modules["finetune"] = None
import torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

def adapted(job):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) if job["nf4"] else None
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]), quantization_config=settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if job["vocabulary"] > model.config.vocab_size:
        model.resize_token_embeddings(job["vocabulary"], mean_resizing=False)
    before = model.eval()(ids(job)).logits.float()
    if job["own"]:
        for name, value in load_file(Path(job["adapter"], "adapter_model.safetensors")).items():
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".bias"))
            module.bias = torch.nn.Parameter(value.to(module.bias.dtype))
        return before, model
    return before, PeftModel.from_pretrained(model, job["adapter"]).eval()

def ids(job):
    drawn = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(5))
    if job["vocabulary"] > 97:
        drawn[:, ::3] = torch.arange(97, job["vocabulary"]).repeat(2)[:6]
    return drawn

found = {}
with torch.no_grad():
    for job in json.loads(Path(sys.argv[1]).read_text()):
        before, model = adapted(job)
        tuned = model(ids(job)).logits.float()
        merged, info = AutoModelForCausalLM.from_pretrained(job["merged"], dtype="auto", output_loading_info=True)
        after = merged.eval()(ids(job)).logits.float()
        tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        found[job["name"]] = {
            "apart": float((after - tuned).abs().max()),
            "kl": float((tuned.softmax(-1) * (tuned.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()),
            "trained": float((tuned - before).abs().max()) if before.shape == tuned.shape else None,
            "wrong": {kind: sorted(map(str, names)) for kind, names in info.items() if names},
            "tied": tied,
            "dtype": str(merged.dtype),
        }
print(json.dumps(found))
"""


class Bases:
    """Base models, each written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, method: str, column: str, *, tied: bool) -> Path:
        dtype = torch.bfloat16 if column == "bf16" else torch.float32
        path = self.folder / f"{'biased' if method == 'bitfit' else 'plain'}-{dtype}-{tied}"
        if not path.exists():
            if method == "bitfit":
                write_biased(path, tied=tied)
                if dtype != torch.float32:
                    load_base(path, NoQuantization(), dtype).save_pretrained(path)
            else:
                write_llama(path, tied=tied, dtype=dtype)
        return path


def build(folder: Path, bases: Bases, method: str, column: str, *, tied: bool) -> dict[str, Any]:
    """Train (that is, randomize), save and merge one case; what the fresh process needs to know of it."""
    tuning: Any = TypeAdapter(Tuning).validate_python({**LORAS, **OTHERS}[method] | COLUMNS[column])
    base = bases.get(method, column, tied=tied)
    quantization = FourBit(method="nf4") if column.startswith("nf4") else NoQuantization()
    dtype = torch.bfloat16 if column == "bf16" else torch.float32
    ids = NEW if method == "new-tokens" else ()
    directory = folder / f"{method} {column} {tied}"
    adapter = directory / "adapter"
    adapter.mkdir(parents=True)
    torch.manual_seed(3)
    model = load_base(base, quantization, dtype)
    enlarge(model, ids)
    model = attach(model, tuning, Given(new_ids=ids))
    loftq = isinstance(getattr(tuning, "init", None), LoftqInit)
    if loftq:
        save_base_correction(adapter, apply_loftq(model, base, tuning, Quantizer(quantization, dtype)))
    if isinstance(getattr(tuning, "init", None), PissaInit):
        apply_moved(model, base, tuning.init).save(directory)
        randomize(model)
        save_plain(model, directory, adapter)
    else:
        randomize(model)
        save(model, adapter)
    source = MergeSource(base, adapter, quantization, dtype, loftq=loftq, new_ids=ids)
    fold(source, directory / "merged", dtype)
    return {
        "name": f"{method} {column} {tied}",
        "base": str(base),
        "adapter": str(adapter),
        "merged": str(directory / "merged"),
        "nf4": column.startswith("nf4"),
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary": 100 if ids else 97,
        "own": method == "bitfit",
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("matrix")
    bases = Bases(folder)
    jobs = [build(folder, bases, method, column, tied=tied) for method, column, tied in CASES]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # -P, and another working directory: nothing of the repository stands in for what is installed
    command = [sys.executable, "-W", "ignore", "-P", "-c", FRESH, str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.xdist_group("merge-matrix")  # all cases are made once, and not by every worker
@pytest.mark.parametrize(("method", "column", "tied"), CASES, ids=[f"{m}-{c}-{'tied' if t else 'untied'}" for m, c, t in CASES])
def test_a6_a8_merged_logits_are_the_adapters(measured: dict[str, Any], method: str, column: str, tied: bool) -> None:
    found = measured[f"{method} {column} {tied}"]
    assert found["wrong"] == {}
    assert found["apart"] < (BF16_LIMIT if column == "bf16" else LIMIT)
    assert found["kl"] < BF16_KL_LIMIT
    # the adapter matters, else agreement would say nothing
    assert found["trained"] > 0.2
    # PEFT trains either side of a tied pair alone, but for rows and for copies that it keeps equal
    assert found["tied"] == (tied and method != "embeddings-lora")
    assert found["dtype"] == ("torch.bfloat16" if column == "bf16" else "torch.float32")
