"""Every method on every kind of base: trained, resumed, loaded in a fresh process, measured against its base, merged or refused.

What holds is kept in docs/benchmarks/method-matrix.json, from which docs/methods.md is made. After a change that is meant:

    FINETUNE_RECORD=1 python -m pytest tests/e2e/test_methods.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import api
from finetune.errors import ConfigError
from finetune.merging.reload import Measurement, Probe, measure
from finetune.model.head import target_losses
from tests.methods import FIXED

pytestmark = pytest.mark.xdist_group("method-matrix")  # made once, and not by every worker

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "benchmarks" / "method-matrix.json"
IDS = torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(1))
ROWS = (IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "lora, dora": {"method": "lora", "rank": 4, "dora": True},
    "lora, pissa": {"method": "lora", "rank": 4, "init": {"method": "pissa"}, "embeddings": "full"},
    "lora, loftq": {"method": "lora", "rank": 4, "init": {"method": "loftq"}},
    "lora, new tokens": {"method": "lora", "rank": 4, "embeddings": "new-tokens"},
    "tied-lora": {"rank": 4},
    "adalora": {"rank": 2, "init_rank": 4, "every_steps": 1},
    "vera": {"rank": 16},
    **FIXED,
    "full, spectrum": {"method": "full", "targets": {"spectrum": 0.5}},
    "full, galore": {"method": "full"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"full, galore": {"method": "galore", "galore": {"rank": 8, "every_steps": 2}}}
NEW_TOKENS = {"lora, new tokens": ["<note>", "<code>"]}
BASES = ("none", "nf4")
MORE_BASES = {"lora, dora": ("int8",)}
"""Where PEFT handles a base in a way that no other method takes."""

COMBINATIONS = [(method, base) for method in METHODS for base in (*BASES, *MORE_BASES.get(method, ()))]

# Loads every run and every merged model as anybody would, and keeps their losses.
FRESH = '''
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from finetune.config.load import load_config
from finetune.config.schema import NoQuantization
from finetune.finished import load_run
from finetune.model.correction import Corrections
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.quantize import roundtrip
from finetune.model.tokens import enlarge, token_ids
from finetune.runs import open_run

def start_of(finished):
    """The model before its first step, made by other means than the ones that are measured."""
    loftq, config = finished.loftq, finished.config
    quantization = NoQuantization() if loftq else config.quantization
    base = load_base(finished.base, quantization, finished.dtype, finished.device)
    enlarge(base, token_ids(finished.renderer.tokenizer, config.model.new_tokens))
    if loftq:
        with Corrections(finished.directory) as corrections:
            for name in corrections.modules:
                weight = base.get_submodule(name).weight
                weight.copy_(corrections.read(name).start.added_to(roundtrip(weight, config.quantization, finished.dtype)))
    return base

places, out = json.loads(sys.argv[1]), sys.argv[2]
ids = torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(1))
rows = (ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
found = {}
with torch.no_grad():
    for name, (run, merged) in places.items():
        opened = open_run(Path(run))
        finished = load_run(opened, load_config(opened.config).config)
        found[f"{name}/tuned"] = target_losses(finished.model, *rows)
        model, using = finished.untrained()
        with using():
            found[f"{name}/base"] = target_losses(model, *rows)
        found[f"{name}/pristine"] = target_losses(start_of(finished), *rows)
        found[f"{name}/again"] = target_losses(finished.model, *rows)
        if merged:
            found[f"{name}/merged"] = target_losses(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), *rows)
save_file({name: value.clone() for name, value in found.items()}, out)
'''


@dataclass(frozen=True)
class Row:
    """What holds for one method on one kind of base."""

    method: str
    base: str
    trains: bool
    """Three steps ran, and the tuned model is another one than its base. False: a configuration error says why not."""
    resumes: bool
    """A run that goes on from its second step ends at the same bytes."""
    reloads: bool
    """Loaded in a fresh process, with the kernels of training, every loss is the trained model's, bit by bit.

    PiSSA's, which are rewritten for the untouched base: within 1e-5.
    """
    compared: bool
    """Its base, as `finetune eval` measures it, is the untouched one (LoftQ: with its start), and measuring it changes nothing."""
    merges: bool
    """The merged model, loaded by plain transformers in a fresh process, has the tuned model's losses within 1e-4 (int8: 1e-2)."""
    reason: str
    """Why it does not train or does not merge, in the words of the error."""


@dataclass
class Trained:
    """A run, and the losses of its model before it was written."""

    run: Path
    losses: torch.Tensor
    resumes: bool
    merged: Path | None
    reason: str


class Matrix:
    """Runs everything once."""

    def __init__(self, folder: Path, write: Callable[[str, str], Path]) -> None:
        self.folder, self.write = folder, write
        self.losses: torch.Tensor | None = None
        self.refused: dict[str, str] = {}
        self.trained: dict[str, Trained] = {}

    def keep_losses(self, patch: pytest.MonkeyPatch) -> None:
        """Look at the model in the moment before its result is written; and merge without a process for each."""
        from finetune.merging import trials
        from finetune.training import train

        export = train.export

        def seen(run: Any, config: Any, tokenizer: Any, model: Any, progress: Any) -> Path:
            with torch.no_grad():
                self.losses = target_losses(model.eval(), *ROWS)
            return export(run, config, tokenizer, model, progress)

        def measured(directory: Path, probe: Probe, device: str) -> Measurement:
            return measure(AutoModelForCausalLM.from_pretrained(directory, device_map={"": device}).eval(), probe, device)

        patch.setattr(train, "export", seen)
        patch.setattr(trials, "measure_in_fresh_process", measured)

    def run(self, method: str, base: str) -> None:
        name = f"{method} on {base}"
        try:
            run = api.train(api.load_config(self.write(method, base)).config).path
        except ConfigError as error:
            self.refused[name] = error.problems[0].what
            return
        assert self.losses is not None
        losses = self.losses
        resumes = self.resumed(run)
        merged, reason = self.folder / f"{name} merged", ""
        try:
            api.merge(run, merged, dtype="fp32")
        except ConfigError as error:
            reason = error.problems[0].what
            assert not merged.exists()
        self.trained[name] = Trained(run, losses, resumes, None if reason else merged, reason)

    def resumed(self, run: Path) -> bool:
        """Whether a copy of ``run`` that lost everything after its second step ends as it did."""
        copy = run.with_name(f"{run.name} copy")
        shutil.copytree(run, copy)
        for lost in ("adapter", "model", "checkpoints/step-00000003"):
            shutil.rmtree(copy / lost, ignore_errors=True)
        config = api.load_config(copy / "config.yaml", [f"output={copy}"]).config
        api.train(config, resume=True)
        return result(copy) == result(run)

    def rows(self) -> Iterator[Row]:
        places = {name: (str(found.run), str(found.merged or "")) for name, found in self.trained.items()}
        out = self.folder / "found.safetensors"
        subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(places), str(out)], check=True, cwd=ROOT)
        found = load_file(out)
        for method, base in COMBINATIONS:
            name = f"{method} on {base}"
            if name in self.refused:
                yield Row(method, base, False, False, False, False, False, self.refused[name])
            else:
                part = {key.rpartition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")}
                yield row(method, base, self.trained[name], part)


def row(method: str, base: str, trained: Trained, found: dict[str, torch.Tensor]) -> Row:
    tuned = trained.losses
    differs = float((found["tuned"] - found["base"]).abs().max()) > 1e-4
    base_is_pristine = float((found["base"] - found["pristine"]).abs().max()) < 1e-5
    compared = base_is_pristine and torch.equal(found["again"], found["tuned"])
    # the products of an int8 layer round their input too, which no merged weight does
    merges = "merged" in found and float((found["merged"] - tuned).abs().max()) < (1e-2 if base == "int8" else 1e-4)
    rewritten = method == "lora, pissa" and float((found["tuned"] - tuned).abs().max()) < 1e-5
    reloads = rewritten or torch.equal(found["tuned"], tuned)
    return Row(method, base, differs, trained.resumes, reloads, compared, merges, trained.reason)


def result(run: Path) -> dict[str, str]:
    """Hashes of the trained weights."""
    directory = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    hashes = json.loads((directory / "MANIFEST.json").read_text())["sha256"]
    return {name: value for name, value in hashes.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def matrix(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, make_tiny_model: Callable[..., Path], chat_file: Path
) -> list[Row]:
    folder = tmp_path_factory.mktemp("matrix")
    biased = make_tiny_model(attention_bias=True)

    def write(method: str, base: str) -> Path:
        path = folder / f"{method} on {base}.yaml"
        config = {
            "model": {"id": str(biased if method == "bitfit" else tiny_model_dir), "new_tokens": NEW_TOKENS.get(method, [])},
            "quantization": {"method": base},
            "tuning": {"method": method} | METHODS[method],
            "optimizer": {"learning_rate": 0.02} | OPTIMIZERS.get(method, {}),
            "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": {
                "epochs": 1,
                "max_steps": 3,
                "batch_size": 8,
                "precision": "fp32",
                "checkpoint": {"every_steps": 1, "keep": 5},
                # whether int8 is packed hangs on the weights: products that round their input turn the last bit into more
                "kernels": "plain" if base == "int8" else "auto",
            },
            "output": str(folder / f"{method} on {base}"),
        }
        path.write_text(json.dumps(config))
        return path

    made = Matrix(folder, write)
    with pytest.MonkeyPatch.context() as patch:
        made.keep_losses(patch)
        for method, base in COMBINATIONS:
            made.run(method, base)
    return list(made.rows())


def test_a_method_trains_resumes_and_reloads_or_says_why_not(matrix: list[Row]) -> None:
    for found in matrix:
        if found.trains:
            assert (found.resumes, found.reloads, found.compared) == (True, True, True), found
        else:
            why = {"lora, loftq on none": "the base is not quantized", "lora, pissa on nf4": "the base is nf4"}
            if found.method.startswith("full"):
                assert found.base == "nf4", found
            assert why.get(f"{found.method} on {found.base}", "cannot be trained") in found.reason, found


def test_what_cannot_be_merged_says_why(matrix: list[Row]) -> None:
    unmerged = {found.method: found.reason for found in matrix if found.trains and not found.merges}
    assert set(unmerged) == {"prompt", "prefix", "houlsby", "full", "full, spectrum", "full, galore"}
    assert all(unmerged.values())


def test_the_page_of_methods_shows_what_holds(matrix: list[Row]) -> None:
    text = json.dumps([asdict(found) for found in matrix], indent=1) + "\n"
    if os.environ.get("FINETUNE_RECORD"):
        RECORD.write_text(text)
    assert RECORD.read_text() == text
