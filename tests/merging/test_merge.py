"""The whole merge: written whole and proven, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import FourBit, NoQuantization, Quantization
from finetune.errors import ConfigError, DataError, FinetuneError, VerificationError
from finetune.merging import trials
from finetune.merging.identity import require_rows
from finetune.merging.merge import MergeOptions, merge
from finetune.merging.reload import Probe, measure
from finetune.model.adapters import load
from finetune.sealed import verify

NF4 = FourBit(method="nf4")
FP32 = MergeOptions(dtype="fp32")
Make = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    ids: list[int]
    mask: list[bool]


ROWS = [Row([(7 * row + 5 * place) % 97 for place in range(20)], [place > 3 for place in range(20)]) for row in range(6)]


def train(made: Any, steps: int, learning_rate: float) -> None:
    """A few real steps, so that there is a gain to keep."""
    model = made.model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=learning_rate)
    for _ in range(steps):
        ids = torch.tensor([row.ids for row in ROWS])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(made.source.adapter_dir, save_embedding_layers=False)


def in_process(directory: Path, probe: Probe, device: str) -> Any:
    """Stands for the fresh process where the test is about something else."""
    return measure(AutoModelForCausalLM.from_pretrained(directory).eval(), probe, device)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "measure_in_fresh_process", in_process)


def siblings(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


def test_a_merge_is_proven_in_a_fresh_process_and_described(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4, loftq=2, tied=True, lora={"target_modules": ["q_proj", "up_proj", "embed_tokens"], "use_dora": True})
    train(made, 12, 1e-2)
    report = merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert siblings(tmp_path) == {"base", "adapter", "merged"}
    assert report.parity.max_logit_difference < 1e-4
    assert report.parity.gain_kept == pytest.approx(1.0, abs=1e-4)
    assert report.parity.argmax_agreement == 1.0
    assert report.trials[0].identity is not None
    assert report.trials[0].identity < 1e-6
    described = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert described == json.loads(json.dumps(report.as_json()))
    assert described["dtype"] == "fp32"
    verify(tmp_path / "merged")


@pytest.mark.usefixtures("quick")
def test_auto_takes_the_smallest_type_that_keeps_the_gain(make: Make, tmp_path: Path) -> None:
    # a bf16 base lies on the bf16 grid, and a short run's update is smaller than its steps
    made = make(stored=torch.bfloat16)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.0 if parameter.shape[0] != 4 else 1.0
    train(made, 4, 3e-4)
    report = merge(made.model, made.source, tmp_path / "merged", ROWS)
    assert [trial.dtype for trial in report.trials] == ["bf16", "fp16"]
    assert "of the validation gain" in report.trials[0].reason
    assert report.dtype == "fp16"
    assert report.parity.gain_kept is not None
    assert report.parity.gain_kept >= 0.99
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float16


@pytest.mark.usefixtures("quick")
def test_auto_passes_over_a_type_whose_range_is_too_small(make: Make, tmp_path: Path) -> None:
    made = make(lora={"modules_to_save": ["model.norm"]})
    made.model.get_base_model().model.norm.modules_to_save["default"].weight.data[3] = 1e5
    made.model.save_pretrained(made.source.adapter_dir, save_embedding_layers=False)
    with pytest.raises(VerificationError, match="do not fit"):
        merge(made.model, made.source, tmp_path / "merged", ROWS, MergeOptions(dtype="fp16"))
    assert siblings(tmp_path) == {"base", "adapter"}


@pytest.mark.usefixtures("quick")
def test_auto_passes_over_a_type_whose_weights_are_not_the_live_ones(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    train(made, 12, 1e-2)

    def strict(rows: Any, directory: Path, *how: Any) -> float:
        if AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16:
            raise VerificationError("q_proj differs from the adapter model's weight by 0.1 of its norm", where=str(directory))
        return require_rows(rows, directory, *how)

    monkeypatch.setattr(trials, "require_rows", strict)
    report = merge(made.model, made.source, tmp_path / "merged", ROWS)
    assert (report.trials[0].dtype, report.trials[0].accepted) == ("bf16", False)
    assert "q_proj differs" in report.trials[0].reason
    assert report.dtype != "bf16"


@pytest.mark.usefixtures("quick")
def test_auto_ends_with_every_reason_where_no_type_passes(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()

    def never(_rows: Any, directory: Path, *_how: Any) -> float:
        raise VerificationError("q_proj differs from the adapter model's weight", where=str(directory))

    monkeypatch.setattr(trials, "require_rows", never)
    with pytest.raises(VerificationError) as error:
        merge(made.model, made.source, tmp_path / "merged", ROWS)
    assert [problem.what.split(":")[0] for problem in error.value.problems] == ["merged as bf16", "merged as fp16", "merged as fp32"]
    assert siblings(tmp_path) == {"base", "adapter"}


@pytest.mark.parametrize("quantization", [NoQuantization(), NF4], ids=["bf16", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("quick")
def test_fp32_embeddings_on_a_bf16_base_merge_as_they_were_trained(
    make: Make, tmp_path: Path, quantization: Quantization, tied: bool
) -> None:
    made = make(
        stored=torch.bfloat16,
        compute=torch.bfloat16,
        quantization=quantization,
        tied=tied,
        lora={"modules_to_save": ["model.embed_tokens"]},
    )
    loaded = load(made.fresh_base(), made.source.adapter_dir).eval()
    report = merge(loaded, made.source, tmp_path / "merged", ROWS, FP32)
    assert report.trials[0].identity is not None
    assert report.trials[0].identity < 1e-6
    written = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    stored = load_file(made.source.adapter_dir / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(written, stored)


@pytest.mark.parametrize("loftq", [0, 2])
@pytest.mark.usefixtures("quick")
def test_a18_the_original_base_is_judged_by_the_gain(make: Make, tmp_path: Path, loftq: int) -> None:
    made = make(quantization=NF4, loftq=loftq)
    train(made, 12, 1e-2)
    report = merge(made.model, replace(made.source, base="original"), tmp_path / "merged", ROWS, FP32)
    assert report.base == "original"
    assert report.parity.gain_kept is not None
    assert report.parity.gain_kept > 0.5
    assert report.trials[0].identity is None


@pytest.mark.usefixtures("quick")
def test_the_live_model_is_as_it_was(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4, loftq=2, lora={"use_dora": True, "modules_to_save": ["embed_tokens"]})
    before, flags = made.logits(), [parameter.requires_grad for parameter in made.model.parameters()]
    merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert torch.equal(made.logits(), before)
    assert [parameter.requires_grad for parameter in made.model.parameters()] == flags


# --- damage: a reason, the right exit code, and nothing at the destination or beside it ---------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled(made: Any) -> None:
    base = made.source.base_dir
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def linked(made: Any) -> None:
    path = made.source.adapter_dir / "adapter_model.safetensors"
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Any], object], str]] = {
    "damaged-base": (lambda made: truncate(made.source.base_dir / "model.safetensors"), "damaged"),
    "damaged-adapter": (lambda made: truncate(made.source.adapter_dir / "adapter_model.safetensors"), "damaged"),
    "missing-base-tensor": (
        lambda made: edit(made.source.base_dir / "model.safetensors", lambda found: found.pop("model.norm.weight")),
        r"lacks 1 tensors, model.norm.weight",
    ),
    "base-nan": (
        lambda made: edit(made.source.base_dir / "model.safetensors", lambda found: found["model.norm.weight"].fill_(torch.nan)),
        "NaN",
    ),
    "missing-target": (
        lambda made: edit(made.source.base_dir / "model.safetensors", lambda found: found.pop("model.layers.0.self_attn.q_proj.weight")),
        "q_proj",
    ),
    "unused-adapter-tensor": (
        lambda made: edit(
            made.source.adapter_dir / "adapter_model.safetensors", lambda found: found.update({"base_model.model.odd": torch.ones(2)})
        ),
        "no known use",
    ),
    "renamed-adapter-tensors": (
        lambda made: edit(
            made.source.adapter_dir / "adapter_model.safetensors",
            lambda found: [found.update({key.replace("layers.1", "layers.7"): found.pop(key)}) for key in list(found)],
        ),
        "no such tensor",
    ),
    "half-a-pair": (
        lambda made: edit(made.source.adapter_dir / "adapter_model.safetensors", lambda found: found.pop(f"{PREFIX}.lora_A.weight")),
        "instead of",
    ),
    "wrong-shape": (
        lambda made: edit(
            made.source.adapter_dir / "adapter_model.safetensors",
            lambda found: found.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 32)}),
        ),
        "shape",
    ),
    "wrong-rank": (lambda made: edit_json(made.source.adapter_dir / "adapter_config.json", r=8), "rank 8"),
    "adapter-nan": (
        lambda made: edit(
            made.source.adapter_dir / "adapter_model.safetensors", lambda found: found[f"{PREFIX}.lora_B.weight"].fill_(torch.nan)
        ),
        "NaN",
    ),
    "empty-adapter": (lambda made: save_file({}, made.source.adapter_dir / "adapter_model.safetensors"), "empty"),
    "no-adapter": (lambda made: (made.source.adapter_dir / "adapter_model.safetensors").unlink(), "missing"),
    "bad-config": (lambda made: (made.source.adapter_dir / "adapter_config.json").write_text("{"), "cannot read"),
    "pickled-base": (pickled, "pickled"),
    "symlink": (linked, "symbolic link"),
    "stale-correction": (
        lambda made: save_file({"a": torch.ones(1)}, made.source.adapter_dir / "loftq_base.safetensors"),
        "did not use LoftQ",
    ),
    "other-weights": (
        lambda made: edit(made.source.adapter_dir / "adapter_model.safetensors", lambda found: found[f"{PREFIX}.lora_B.weight"].mul_(1.5)),
        "differs from the adapter model",
    ),
    "wrong-scale": (
        lambda made: edit_json(made.source.adapter_dir / "adapter_config.json", lora_alpha=4),
        "differs from the adapter model",
    ),
    "other-base": (
        lambda made: edit(
            made.source.base_dir / "model.safetensors", lambda found: found["model.layers.0.self_attn.q_proj.weight"].mul_(1.01)
        ),
        "differs from the adapter model",
    ),
    "other-norm": (
        lambda made: edit(made.source.base_dir / "model.safetensors", lambda found: found["model.norm.weight"].mul_(1.2)),
        "mean KL",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.usefixtures("quick")
def test_a4_b9_c1_damage_is_refused_and_leaves_nothing(make: Make, tmp_path: Path, kind: str) -> None:
    made = make()
    damage, reason = DAMAGE[kind]
    damage(made)
    with pytest.raises(VerificationError, match=reason) as error:
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert error.value.exit_code == 6
    assert siblings(tmp_path) == {"base", "adapter"}


@pytest.mark.parametrize(
    "features",
    [
        {"peft_type": "PROMPT_TUNING"},
        {"trainable_token_indices": [3]},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 1]]},
        {"ensure_weight_tying": True},
        {"a_switch_from_the_future": {"on": True}},
    ],
    ids=lambda features: next(iter(features)),
)
def test_features_that_are_not_understood_are_named(make: Make, tmp_path: Path, features: dict[str, object]) -> None:
    made = make()
    edit_json(made.source.adapter_dir / "adapter_config.json", **features)
    with pytest.raises(VerificationError, match=next(iter(features))):
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert siblings(tmp_path) == {"base", "adapter"}


@pytest.mark.parametrize("kind", ["missing", "foreign", "half", "no-scale"])
def test_a6_a_lost_loftq_correction_is_refused(make: Make, tmp_path: Path, kind: str) -> None:
    made = make(quantization=NF4, loftq=2)
    path = made.source.adapter_dir / "loftq_base.safetensors"
    tensors = load_file(path)
    path.unlink()
    if kind == "foreign":
        save_file(tensors, path)
    elif kind == "no-scale":
        save_file(tensors, path, {"format": "finetune-loftq-1", "scales": "{}"})
    elif kind == "half":
        tensors.pop("model.layers.0.self_attn.q_proj.start.B")
        save_file(tensors, path, {"format": "finetune-loftq-1", "scales": '{"model.layers.0.self_attn.q_proj": 2.0}'})
    with pytest.raises(VerificationError, match="loftq_base"):
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert siblings(tmp_path) == {"base", "adapter"}


def test_a_shard_that_is_not_what_the_index_says_is_refused(make: Make, tmp_path: Path) -> None:
    made = make(shards=True)
    index = made.source.base_dir / "model.safetensors.index.json"
    placement = json.loads(index.read_text())["weight_map"]
    assert placement["lm_head.weight"] != placement["model.layers.1.mlp.up_proj.weight"]
    for weight_map, reason in (
        ({**placement, "model.norm.weight": "../secret.safetensors"}, "no safetensors file beside"),
        ({**placement, "lm_head.weight": placement["model.layers.1.mlp.up_proj.weight"]}, "not where the index says"),
        ({name: file for name, file in placement.items() if name != "model.norm.weight"}, r"not where the index says|lacks 1 tensors"),
    ):
        edit_json(index, weight_map=weight_map)
        with pytest.raises(VerificationError, match=reason):
            merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    edit_json(index, weight_map=placement)
    (made.source.base_dir / placement["lm_head.weight"]).unlink()
    with pytest.raises(VerificationError, match="missing or damaged"):
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert siblings(tmp_path) == {"base", "adapter"}


# --- the destination ----------------------------------------------------------------------------------------------------------------------


def test_c10_where_nothing_is_written(make: Make, tmp_path: Path) -> None:
    made = make()
    taken, link = tmp_path / "taken", tmp_path / "link"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    link.symlink_to(tmp_path / "nowhere")
    cases = [
        (taken, FP32, "not empty"),
        (taken, replace(FP32, force=True), "something other than a merged model"),
        (link, FP32, "symbolic link"),
        (made.source.base_dir, FP32, "overlaps"),
        (made.source.adapter_dir / "merged", FP32, "overlaps"),
        (tmp_path, FP32, "overlaps"),
    ]
    for destination, options, reason in cases:
        with pytest.raises(ConfigError, match=reason) as error:
            merge(made.model, made.source, destination, ROWS, options)
        assert error.value.exit_code == 2
    assert (taken / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("quick")
def test_force_replaces_an_earlier_merge_and_only_when_the_new_one_is_good(make: Make, tmp_path: Path) -> None:
    made = make()
    destination = tmp_path / "merged"
    destination.mkdir()
    merge(made.model, made.source, destination, ROWS, FP32)
    with pytest.raises(ConfigError, match="--force"):
        merge(made.model, made.source, destination, ROWS, FP32)
    first = (destination / "model.safetensors").read_bytes()
    path = made.source.adapter_dir / "adapter_model.safetensors"
    good = path.read_bytes()
    truncate(path)
    with pytest.raises(VerificationError):
        merge(made.model, made.source, destination, ROWS, replace(FP32, force=True))
    assert (destination / "model.safetensors").read_bytes() == first
    path.write_bytes(good)
    merge(made.model, made.source, destination, ROWS, MergeOptions(dtype="bf16", force=True))
    assert AutoModelForCausalLM.from_pretrained(destination).dtype == torch.bfloat16
    assert siblings(tmp_path) == {"base", "adapter", "merged"}


def test_a_merge_that_cannot_be_verified_is_refused(make: Make, tmp_path: Path) -> None:
    made = make()
    for rows in ([], [Row([1, 2, 3], [False] * 3)]):
        with pytest.raises(DataError, match="no row has a supervised token"):
            merge(made.model, made.source, tmp_path / "merged", rows, FP32)


def test_an_interrupt_leaves_nothing(make: Make, tmp_path: Path) -> None:
    made = make()

    def interrupt(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made.model, made.source, tmp_path / "merged", ROWS, replace(FP32, progress=interrupt))
    assert siblings(tmp_path) == {"base", "adapter"}


def test_a_full_disk_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.model.shards.ShardWriter.write", full)
    with pytest.raises(FinetuneError, match="No space left") as error:
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert error.value.exit_code == 4
    assert siblings(tmp_path) == {"base", "adapter"}
