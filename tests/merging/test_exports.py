"""Exports: what is written loads without this package, computes what was trained, and says what it cost; what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import FourBit
from finetune.errors import ConfigError, VerificationError
from finetune.merging import adapter_reload, exports, nf4
from finetune.merging.exports import ExportOptions, export
from finetune.merging.fold import fold
from finetune.merging.nf4 import quantize_directory
from finetune.merging.plain_adapter import needed_rank, write_plain
from finetune.merging.reload import Measurement, Probe, measure
from finetune.model.quantize import dequantized, disable_cpu_repacking, is_quantized, roundtrip
from tests.merging.conftest import TOKENS, Made, load_base
from tests.merging.test_merge import ROWS
from tests.merging.test_methods import NF4, NONE
from tests.merging.test_methods import make as make_method

Make = Callable[..., Made]
FP32 = torch.float32


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits.float()


def through_peft(made: Any, adapter: Path, *, original: bool = False) -> torch.Tensor:
    """What PEFT computes from the exported adapter on its stated base."""
    base = load_base(made.source.base_dir, NONE if original else made.source.quantization, made.source.compute_dtype)
    return logits(PeftModel.from_pretrained(base, adapter))


# --- plain adapters ----------------------------------------------------------------------------------------------------------------------

LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.": 6}, "alpha_pattern": {"down_proj": 32}},
    "some-layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("quantization", [NONE, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_becomes_one_rank_and_scale_one(make: Make, tmp_path: Path, kind: str, quantization: Any) -> None:
    """Engines ignore rank_pattern and alpha_pattern (vLLM's PEFTHelper has no such fields), so that none may be needed."""
    made = make(quantization=quantization, lora=LORAS[kind])
    report = write_plain(made.source, tmp_path / "out", 1, FP32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert report.error == 0.0
    assert config["r"] == config["lora_alpha"] == report.rank
    for switch in (
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "layer_replication",
    ):
        assert not config[switch], switch
    ranks = {name: min(tensor.shape) for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert set(ranks.values()) == {report.rank}
    assert (through_peft(made, tmp_path / "out") - made.logits()).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantization", [NONE, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("kind", ["adalora", "vera", "tied-lora"])
def test_other_low_rank_methods_become_a_plain_lora(tmp_path: Path, kind: str, quantization: Any, tied: bool) -> None:
    made = make_method(tmp_path, kind, tied=tied, quantization=quantization)
    report = write_plain(made.source, tmp_path / "out", 1, FP32)
    assert report.error == 0.0
    assert (through_peft(made, tmp_path / "out") - logits(made.model)).abs().max() < 1e-4


def test_a18_loftq_is_exported_for_the_pristine_base(make: Make, tmp_path: Path) -> None:
    """On W: W + s(BA - B0 A0), the same weights as a merge onto the original base; on its own NF4 base: the adapter as it is."""
    made = make(quantization=NF4, loftq=1)
    write_plain(made.source, tmp_path / "nf4", 1, FP32)
    assert (through_peft(made, tmp_path / "nf4") - made.logits()).abs().max() < 1e-4
    original = replace(made.source, base="original")
    assert write_plain(original, tmp_path / "plain", 1, FP32).rank == 8
    fold(original, tmp_path / "merged", FP32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (through_peft(made, tmp_path / "plain", original=True) - logits(merged)).abs().max() < 1e-4


def test_loftq_of_several_iterations_has_no_base_to_serve_on(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4, loftq=3)
    with pytest.raises(ConfigError, match="several iterations") as caught:
        write_plain(made.source, tmp_path / "out", 1, FP32)
    assert "--base original" in caught.value.problems[0].fix
    write_plain(replace(made.source, base="original"), tmp_path / "out", 1, FP32)


@pytest.mark.parametrize("kind", ["norm", "bitfit", "embeddings-full", "new-tokens"])
def test_what_no_lora_can_hold_is_refused(tmp_path: Path, kind: str) -> None:
    made = make_method(tmp_path, kind, tied=True)
    with pytest.raises(ConfigError, match="cannot be exported as a plain LoRA") as caught:
        export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter"))
    assert "--to safetensors" in caught.value.problems[0].fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantization", [NONE, NF4], ids=["none", "nf4"])
def test_dora_is_approximated_as_well_as_its_rank_allows(make: Make, tmp_path: Path, quantization: Any) -> None:
    """The error is that of the best approximation (Eckart and Young): the root of the singular values that are left out."""
    made = make(quantization=quantization, lora={"use_dora": True})
    assert needed_rank(made.source) == 4
    fold(made.source, tmp_path / "merged", FP32)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    before = {name: tensor for name, tensor in load_file(made.source.base_dir / "model.safetensors").items() if "_proj" in name}
    worst = {}
    for rank in (4, 16, 64):
        worst[rank] = write_plain(made.source, tmp_path / f"rank {rank}", rank, FP32).error
        expected = 0.0
        for name, weight in before.items():
            start = roundtrip(weight, quantization, FP32)
            sigma = torch.linalg.svdvals(after[name] - start)
            expected = max(expected, float(sigma[rank:].norm() / sigma.norm()))
        assert worst[rank] == pytest.approx(expected, abs=1e-3)
    assert worst[4] > worst[16] > worst[64]
    assert (through_peft(made, tmp_path / "rank 64") - made.logits()).abs().max() < 1e-4


def test_ia3_is_approximated_too(tmp_path: Path) -> None:
    made = make_method(tmp_path, "ia3", tied=False)
    assert needed_rank(made.source) == 16
    assert write_plain(made.source, tmp_path / "out", 64, FP32).error < 1e-5
    assert (through_peft(made, tmp_path / "out") - logits(made.model)).abs().max() < 1e-4


# --- NF4 ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
def test_nf4_is_what_transformers_would_make_of_the_merged_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, double: bool, shards: bool
) -> None:
    made = make(tied=tied)
    fold(made.source, tmp_path / "merged", FP32)
    quantization = FourBit(method="nf4", double_quant=double)
    if shards:
        monkeypatch.setattr(nf4, "SHARD_BYTES", 8000)
    (tmp_path / "out").mkdir()
    modules = frozenset(name.removesuffix(".weight") for name in load_file(tmp_path / "merged" / "model.safetensors") if "_proj" in name)
    size = quantize_directory(tmp_path / "merged", tmp_path / "out", modules, quantization, FP32)
    expected = load_base(tmp_path / "merged", quantization, FP32)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    disable_cpu_repacking(found)
    assert not any(info.values()), info
    assert (logits(found) - logits(expected)).abs().max() == 0
    kept = {name for name, module in found.named_modules() if is_quantized(module)}
    assert kept == modules
    for name in modules:
        assert torch.equal(dequantized(found.get_submodule(name)), dequantized(expected.get_submodule(name)))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert size == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert (len(files) > 1) == shards
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert set(index["weight_map"].values()) == {file.name for file in files}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied


def test_a6_an_update_on_the_grid_is_rounded_away_and_one_beside_it_is_not() -> None:
    """Why an NF4 export tries the original base too: quantizing is a projection, and a twentieth of its error does not leave a point of the
    grid, while beside the grid the same update moves a twentieth of the weights to another point, as far as it should on average."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) * 0.02
    grid = roundtrip(weight, NF4, FP32)
    update = torch.randn(256, 256, generator=generator) * (weight - grid).std() / 20
    # the largest of each block sets its scale, and is changed too: it is put back, to see the rounding alone
    kept_on_grid = float((((roundtrip(grid + update, NF4, FP32) - grid) * update).sum()) / update.square().sum())
    kept_beside = float((((roundtrip(weight + update, NF4, FP32) - grid) * update).sum()) / update.square().sum())
    assert kept_on_grid < 0.5
    assert kept_beside == pytest.approx(1.0, abs=0.35)


# --- the whole export --------------------------------------------------------------------------------------------------------------------


def in_process(module: str, directory: Path, settings: tuple[str, ...], probe: Probe, device: str) -> Measurement:
    if module == "finetune.merging.reload":
        model = AutoModelForCausalLM.from_pretrained(directory)
        disable_cpu_repacking(model)
    else:
        base, dtype, quantization = settings
        model = adapter_reload.loaded(base, directory, device, getattr(torch, dtype), json.loads(quantization))
        assert not adapter_reload.unlike_the_file(model, directory)
    return measure(model.eval(), probe, device)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process for each measurement: `tests/e2e/test_exports.py` has them."""
    monkeypatch.setattr(exports, "measured_by", in_process)


@pytest.mark.usefixtures("quick")
def test_an_nf4_export_tries_both_bases_and_keeps_the_better(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4)
    report = export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("nf4"))
    assert [trial.name for trial in report.trials] == ["onto the dequantized base", "onto the original base"]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["to"] == "nf4"
    assert record["merged_onto"] in report.chosen.name
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert len(record["trials"]) == 2
    assert report.parity.mean_kl == min(trial.parity.mean_kl for trial in report.trials)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.quantization_config.load_in_4bit
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["nf4", "adapter"])
def test_a6_an_export_that_lost_what_was_learned_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    made = make(quantization=NF4)
    reference = exports.reference_of

    def learned(*arguments: Any) -> Any:
        """As if training had gained a nat, of which the export keeps little."""
        found = reference(*arguments)
        return replace(found, trained=replace(found.trained, loss=found.trained.loss - 0.9), loss_base=found.trained.loss + 0.1)

    monkeypatch.setattr(exports, "reference_of", learned)
    with pytest.raises(VerificationError, match="of what training gained") as caught:
        export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions(kind))
    assert caught.value.exit_code == 6
    assert "--to safetensors" in caught.value.problems[0].fix
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_the_rank_of_an_approximation_grows_until_it_is_good_enough(make: Make, tmp_path: Path) -> None:
    made = make(lora={"use_dora": True})
    report = export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter"))
    errors = [trial.details["error"] for trial in report.trials]
    assert [trial.details["rank"] for trial in report.trials] == [4, 8, 16, 32, 64][: len(errors)]
    assert errors == sorted(errors, reverse=True)
    assert [trial.accepted for trial in report.trials] == [False] * (len(errors) - 1) + [True]
    assert through_peft(made, tmp_path / "out").shape == made.logits().shape
    with pytest.raises(ConfigError, match="not empty"):
        export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter"))
    again = export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter", rank=64, force=True))
    assert [trial.details["rank"] for trial in again.trials] == [64]


@pytest.mark.usefixtures("quick")
def test_a_rank_for_an_exact_conversion_is_refused(make: Make, tmp_path: Path) -> None:
    made = make()
    with pytest.raises(ConfigError, match="converted exactly"):
        export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter", rank=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_adapter_is_written_in_the_type_that_was_asked_for(make: Make, tmp_path: Path, dtype: Any) -> None:
    made = make()
    export(made.model, made.source, tmp_path / "out", ROWS, ExportOptions("adapter", dtype=dtype))
    stored = {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert stored == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}


# --- files beside the weights ------------------------------------------------------------------------------------------------------------


def test_a3_generation_stops_where_training_taught_to(make: Make, tmp_path: Path) -> None:
    made = make()
    path = made.source.base_dir / "generation_config.json"
    path.unlink(missing_ok=True)
    for number, (settings, expected) in enumerate(
        [({"eos_token_id": 2, "temperature": 0.6, "do_sample": True}, [2, 7]), ({"eos_token_id": [7, 2]}, [7, 2]), ({}, 7)]
    ):
        path.write_text(json.dumps(settings))
        fold(replace(made.source, end_ids=(7,)), tmp_path / f"out{number}", FP32)
        found = json.loads((tmp_path / f"out{number}" / "generation_config.json").read_text())
        assert found == settings | {"eos_token_id": expected}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}").generation_config.eos_token_id == expected
    path.unlink()
    fold(replace(made.source, end_ids=(7,)), tmp_path / "none", FP32)
    assert json.loads((tmp_path / "none" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


REMOTE = "import pathlib\npathlib.Path({path!r}).touch()\nfrom transformers import LlamaConfig as Own, LlamaForCausalLM as OwnModel\n"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["merge", "nf4", "adapter"])
def test_c1_c2_pickles_and_remote_code_beside_a_model_are_left_alone(make: Make, tmp_path: Path, kind: Any) -> None:
    import pickle

    made = make(quantization=NF4)
    sentinel = tmp_path / "ran"
    for folder in (made.source.base_dir, made.source.adapter_dir):
        for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pth", "training_args.bin", "data.pkl"):
            (folder / name).write_bytes(pickle.dumps(Payload(sentinel)))
        (folder / "own.py").write_text(REMOTE.format(path=str(sentinel)))
    path = made.source.base_dir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}))
    out = tmp_path / "out"
    if kind == "merge":
        fold(made.source, out, FP32)
    else:
        export(made.model, made.source, out, ROWS, ExportOptions(kind))
    assert not sentinel.exists()
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".md"}
    if kind != "adapter":
        assert "auto_map" not in json.loads((out / "config.json").read_text())
    # the sentinel works
    pickle.loads((made.source.base_dir / "data.pkl").read_bytes())
    assert sentinel.exists()
