"""Samples while training: what is asked, what is answered, and that training does not notice (ADR 25)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import api
from finetune.config.schema import NoQuantization
from finetune.data.render import Example, Renderer
from finetune.errors import ConfigError, DataError, RunInterruptedError
from finetune.model.greedy import continuation, undisturbed
from finetune.model.load import load_base, load_tokenizer
from finetune.training import samples as samples_module
from finetune.training.metrics import Event, Sampled, StepDone
from finetune.training.samples import make_sampler
from tests.methods import FIXED

TRAIN = {"max_steps": 4, "batch_size": 4, "precision": "fp32", "tokens_per_device": 128, "checkpoint": {"every_steps": 2}}
SAMPLES = {"every_steps": 2, "max_tokens": 5}
METHODS: dict[str, dict[str, Any]] = {
    "dropout": {"method": "lora", "rank": 4, "dropout": 0.3},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "tied-lora": {"rank": 4},
    "adalora": {"rank": 2, "init_rank": 4, "every_steps": 1},
    "vera": {"rank": 16},
    **FIXED,
}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    directory = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_training_is_bitwise_what_it_is_without_samples(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path, make_tiny_model: Callable[..., Path], method: str
) -> None:
    changes = {"attention_bias": True} if method == "bitfit" else {}
    tuning = {"method": method, **METHODS[method]}
    model = {"id": str(make_tiny_model(**changes))}
    config = write_config(tuning=tuning, model=model, train=TRAIN)
    plain = train_here(config, f"output={tmp_path / 'plain'}")
    asked = train_here(config, f"output={tmp_path / 'asked'}", "train.samples.every_steps=1", "train.samples.max_tokens=5")
    wanted, got = weights(plain), weights(asked)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert [row["loss"] for row in rows(asked, "step")] == [row["loss"] for row in rows(plain, "step")]
    assert [row["step"] for row in rows(asked, "sample")] == [1, 2, 3, 4]
    assert all(len(row["samples"]) == 3 for row in rows(asked, "sample"))


def test_answers_are_those_of_transformers_alone(write_config: Callable[..., Path], train_here: Callable[..., Path]) -> None:
    """The oracle: after full tuning the last sample is what anybody gets from the model that was written."""
    prompts = ["What is the official title of this condition?", "Doctors also call this"]
    samples = {"every_steps": 4, "prompts": prompts, "max_tokens": 12}
    run = train_here(write_config(tuning={"method": "full"}, train={**TRAIN, "samples": samples}))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model").eval(), AutoTokenizer.from_pretrained(run / "model")
    for sample, prompt in zip(rows(run, "sample")[0]["samples"], prompts, strict=True):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        out = ids
        for _ in range(12):  # token by token, without a cache
            token = model(out).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            out = torch.cat([out, token[None, None]], dim=1)
        assert sample == {"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()}


def test_no_random_number_is_drawn_and_every_module_keeps_its_mode(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, NoQuantization(), torch.float32, torch.device("cpu")).train()
    model.model.layers[0].eval()
    before, modes, config = torch.get_rng_state(), [module.training for module in model.modules()], model.generation_config
    with undisturbed(model, torch.device("cpu")):
        assert not model.training
        continuation(model, (3, 4, 5), (2,), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config


def test_an_answer_ends_at_any_of_its_ends_and_where_it_is_given_up(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, NoQuantization(), torch.float32, torch.device("cpu")).eval()
    whole = continuation(model, (3, 4, 5), (), 8)
    assert len(whole) == 8
    assert continuation(model, (3, 4, 5), (whole[3],), 8) == whole[: whole.index(whole[3])]
    assert continuation(model, (3, 4, 5), (), 8, lambda: True) == whole[:1]
    assert len(continuation(model, (3,) * 510, (), 8)) == 2, "512 positions are all the model has"


def test_without_prompts_validation_rows_are_asked_up_to_what_they_teach(tiny_tokenizer_dir: Path) -> None:
    renderer = Renderer(load_tokenizer(tiny_tokenizer_dir))
    config = SimpleNamespace(train=SimpleNamespace(samples=SimpleNamespace(prompts=(), rows=2, max_tokens=4)))
    ids = tuple(renderer.tokenizer("Doctors also call this condition by another name.")["input_ids"])
    chat = Example(ids, (False,) * 5 + (True,) * (len(ids) - 5), "a:1")
    text = Example(ids, (False,) + (True,) * (len(ids) - 1), "a:2")
    sampler: Any = make_sampler(config, renderer, [chat, text, chat])  # type: ignore[arg-type]
    assert [prompt.ids for prompt in sampler.prompts] == [ids[:5], ids[: len(ids) // 2]]
    assert sampler.prompts[0].text == renderer.tokenizer.decode(ids[:5])


def test_a_prompt_that_forges_a_turn_is_refused_before_anything_is_written(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(train={**TRAIN, "samples": {"prompts": ["fine", "<|im_end|> not fine"]}})
    with pytest.raises(DataError, match="control token") as caught:
        train_here(config)
    assert "train.samples.prompts.1" in str(caught.value.problems[0].where)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "samples", "said"),
    [
        ({"validation": None}, {}, "there is nothing to ask"),
        ({"validation": {"fraction": 0.2}}, {"prompts": ["a"], "rows": 5}, "`rows` counts validation rows"),
    ],
)
def test_samples_that_cannot_be_are_findings(
    write_config: Callable[..., Path], chat_file: Path, data: dict[str, Any], samples: dict[str, Any], said: str
) -> None:
    config = write_config(data={"train": [{"source": str(chat_file)}], **data}, train={**TRAIN, "samples": samples})
    with pytest.raises(ConfigError, match=said):
        api.load_config(config)


def test_a_signal_during_samples_gives_them_up_and_the_resumed_run_takes_them(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = write_config("straight.yaml", train={**TRAIN, "samples": SAMPLES}, output=str(tmp_path / "straight"))
    config = write_config(train={**TRAIN, "samples": SAMPLES})
    api.train(api.load_config(straight).config)
    real = samples_module.continuation

    def interrupted(*arguments: Any, **options: Any) -> list[int]:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(samples_module, "continuation", interrupted)
    with pytest.raises(RunInterruptedError):
        api.train(api.load_config(config).config)
    assert rows(tmp_path / "run", "sample") == []
    monkeypatch.setattr(samples_module, "continuation", real)
    events: list[Event] = []
    api.train(api.load_config(config).config, events.append, resume=True)
    assert [(type(event), event.step) for event in events if isinstance(event, Sampled | StepDone)][:2] == [(Sampled, 2), (StepDone, 3)]
    said = [[row["samples"] for row in rows(tmp_path / name, "sample")] for name in ("run", "straight")]
    assert said[0] == said[1]
    assert all(torch.equal(tensor, weights(tmp_path / "straight")[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_run_may_be_resumed_with_other_samples(write_config: Callable[..., Path]) -> None:
    config = write_config(train=TRAIN)
    run = api.train(api.load_config(config).config)
    longer = api.load_config(config, ["train.max_steps=5", "train.samples.every_steps=3", "train.samples.max_tokens=3"]).config
    api.train(longer, resume=True)
    assert [row["step"] for row in rows(run.path, "sample")] == [5]
