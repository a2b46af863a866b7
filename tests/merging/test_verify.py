"""The comparison itself: its figures against plain formulas, and what it must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from finetune.config.schema import FourBit
from finetune.errors import VerificationError
from finetune.merging.fold import fold
from finetune.merging.identity import require_identity
from finetune.merging.reload import Measurement, Probe, measure
from finetune.merging.verify import Parity, compare, kl_limit, measure_in_fresh_process

NF4 = FourBit(method="nf4")
Make = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    ids: list[int]
    mask: list[bool]


def rows(count: int = 5) -> list[Row]:
    generator = torch.Generator().manual_seed(9)
    found = []
    for index in range(count):
        ids = torch.randint(0, 97, (6 + 3 * index,), generator=generator).tolist()
        found.append(Row(ids, [place >= index for place in range(len(ids))]))
    return found


def test_a_measurement_is_transformers_own_loss_and_logits(make: Make) -> None:
    model = make().model
    total, count, logits = 0.0, 0, []
    with torch.no_grad():
        for row in rows():
            ids = torch.tensor([row.ids])
            labels = torch.where(torch.tensor([row.mask]), ids, -100)
            trained = int((labels[0, 1:] != -100).sum())
            output = model(input_ids=ids, labels=labels)
            total, count = total + float(output.loss) * trained, count + trained
            logits.append(output.logits[0, :-1][labels[0, 1:] != -100])
    found = measure(model, Probe.of(rows(), positions=10_000), "cpu")
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    torch.testing.assert_close(found.logits, torch.cat(logits), rtol=0, atol=1e-5)


def test_the_first_token_is_never_supervised_and_rows_without_targets_are_passed_over(make: Make) -> None:
    model = make().model
    probe = Probe.of([Row([1, 2, 3], [True, False, True]), Row([4, 5], [True, False]), Row([7], [True])])
    assert probe.supervised.tolist() == [False, False, True, False, False, False]
    assert len(measure(model, probe, "cpu").logits) == 1


def test_compared_positions_are_spread_and_limited() -> None:
    probe = Probe.of([Row(list(range(90)), [True] * 90)], positions=10)
    assert probe.compared.sum() == 10
    assert probe.compared.nonzero().flatten()[[0, -1]].tolist() == [1, 89]
    assert not (probe.compared & ~probe.supervised).any()


def test_figures_of_a_comparison() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 97, generator=generator), torch.randn(40, 97, generator=generator)
    found = compare(Measurement(left, 1.0), Measurement(right, 1.25), loss_base=3.0)
    expected = functional.kl_div(right.log_softmax(-1), left.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.mean_kl == pytest.approx(float(expected), rel=1e-5)
    assert found.max_logit_difference == float((left - right).abs().max())
    assert found.argmax_agreement == pytest.approx(float((left.argmax(-1) == right.argmax(-1)).float().mean()))
    assert found.gain_kept == pytest.approx(1.75 / 2.0)
    assert found.positions == 40


def parity(**changes: float) -> Parity:
    return replace(Parity(10, 0.0, 0.0, 1.0, 3.0, 2.0, 2.0), **changes)


def test_what_makes_a_merge_another_model() -> None:
    assert not parity().violations(1e-5)
    assert parity(mean_kl=1e-4).violations(1e-5)
    assert parity(mean_kl=math.nan).violations(1e-5)
    assert parity(loss_merged=2.6).violations(1.0)
    assert parity(loss_merged=math.nan).violations(1.0)
    assert parity(loss_merged=math.nan).as_json()["loss_merged"] is None
    # without a gain there is no share of it
    assert parity(loss_base=2.0).gain_kept is None
    assert not parity(loss_base=2.0, loss_merged=2.0).violations(1e-5)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(VerificationError, match="shape"):
        compare(Measurement(torch.zeros(4, 97), 1.0), Measurement(torch.zeros(4, 98), 1.0), 1.0)


def test_a6_a_merge_onto_the_original_base_is_noticed(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4)
    probe = Probe.of(rows())
    trained = measure(made.model, probe, "cpu")

    def distance(base: Any) -> Parity:
        fold(replace(made.source, base=base), tmp_path / base, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / base)
        return compare(trained, measure(model.eval(), probe, "cpu"), trained.loss + 1)

    limit = kl_limit(torch.float32, torch.float32, "nf4")
    assert not distance("dequantized").violations(limit)
    assert distance("original").violations(limit)
    assert require_identity(made.model, tmp_path / "dequantized", torch.float32) < 1e-6
    with pytest.raises(VerificationError, match="differs from the adapter model"):
        require_identity(made.model, tmp_path / "original", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["computed-fp32", "computed-bf16"])
def test_identity_holds_for_every_type_and_notices_a_lost_update(
    make: Make, tmp_path: Path, compute: torch.dtype, dtype: torch.dtype
) -> None:
    lora = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["model.norm", "lm_head"], "use_dora": True}
    made = make(quantization=NF4, compute=compute, stored=torch.bfloat16, tied=True, lora=lora)
    fold(made.source, tmp_path / "merged", dtype)
    assert require_identity(made.model, tmp_path / "merged", compute) < 1e-4
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    layer = made.model.get_base_model().model.layers[1].mlp.down_proj
    # a tenth of the update is missing
    tensors["model.layers.1.mlp.down_proj.weight"] -= (0.1 * layer.get_delta_weight("default")).to(dtype)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"down_proj.weight differs"):
        require_identity(made.model, tmp_path / "merged", compute)


def test_a_fresh_process_measures_what_this_one_does(make: Make, tmp_path: Path) -> None:
    made = make(tied=True, lora={"target_modules": ["q_proj", "embed_tokens"]})
    fold(made.source, tmp_path / "merged", torch.float32)
    probe = Probe.of(rows())
    found = compare(measure(made.model, probe, "cpu"), measure_in_fresh_process(tmp_path / "merged", probe), 0.0)
    assert found.max_logit_difference < 1e-4
    assert found.mean_kl < 1e-8
    assert found.argmax_agreement == 1.0
    assert found.loss_merged == pytest.approx(found.loss_adapter, abs=1e-6)


def test_a4_a_directory_that_lacks_a_tensor_does_not_pass(make: Make, tmp_path: Path) -> None:
    made = make()
    fold(made.source, tmp_path / "merged", torch.float32)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    # transformers itself would fill the hole with random numbers and go on
    with pytest.raises(VerificationError, match="does not reload") as error:
        measure_in_fresh_process(tmp_path / "merged", Probe.of(rows()))
    assert "up_proj" in str(error.value)
