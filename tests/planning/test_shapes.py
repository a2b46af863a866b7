"""Shapes that are read from a config.json, against the modules that transformers builds from the same file without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.load import load_config
from finetune.config.schema import Model
from finetune.errors import ConfigError
from finetune.planning.families import KnownModel, known_models
from finetune.planning.lookup import find_shape
from finetune.planning.shapes import BUILTIN, known_families, read_shape

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def built(model_type: str, **changes: Any) -> Any:
    """A model as transformers makes it, without weights."""
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def names_and_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("known", known_models(), ids=lambda known: known.ids[0])
def test_a_known_model_is_what_transformers_builds_and_has_the_published_number_of_parameters(known: KnownModel) -> None:
    shape = find_shape(Model(id=known.ids[-1]))
    model = built(**known.config)
    assert names_and_shapes(model) == dict(shape.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters == shape.total
    assert shape.blocks_scalars + shape.other_scalars == shape.total
    assert known.tokens <= shape.vocab or shape.family == "gemma3_text"  # whose tokenizer has one for images


def test_the_families_that_a_plan_promises_ship() -> None:
    ids = {one for known in known_models() for one in known.ids}
    assert len(ids) == sum(len(known.ids) for known in known_models()), "an id stands twice"
    for wanted in (
        *(f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")),
        *("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.3-70B-Instruct"),
        *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
        *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
        *(f"mistralai/Mistral-7B-v0.{version}" for version in (1, 3)),
        *("mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Small-24B-Base-2501"),
        *(f"google/gemma-2-{size}" for size in ("2b", "9b", "27b")),
        *("google/gemma-3-270m", "google/gemma-3-1b-it"),
        *(f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")),
    ):
        assert wanted in ids


CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grouped": {"num_key_value_heads": 2, "head_dim": 24},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", known_families())
@pytest.mark.parametrize("changes", CHANGES)
def test_every_parameter_has_the_name_and_shape_that_transformers_gives_it(family: str, changes: str) -> None:
    """What is left out of config.json included: it has transformers' default for the architecture."""
    stated = CHANGES[changes]
    if family in ("mistral", "phi3", "qwen2", "gemma") and "head_dim" in stated:
        stated = {"num_key_value_heads": 2}
    shape = read_shape({"model_type": family} | SIZES | stated, "here")
    assert dict(shape.parameters()) == names_and_shapes(built(family, **stated))
    assert shape.total == sum(torch.Size(sides).numel() for _, sides in shape.parameters())


def test_what_a_saved_config_says_is_read_back(tmp_path: Path) -> None:
    for family in known_families():
        directory = tmp_path / family
        model = built(family, num_key_value_heads=2)
        model.config.save_pretrained(directory)
        assert dict(find_shape(Model(id=str(directory))).parameters()) == names_and_shapes(model)


def test_the_tokens_of_a_directory_are_counted_where_new_ones_are_added(make_tiny_model: Any) -> None:
    from transformers import AutoTokenizer

    directory = make_tiny_model()
    assert find_shape(Model(id=str(directory))).tokens is None
    assert find_shape(Model(id=str(directory), new_tokens=("<a>",))).tokens == len(AutoTokenizer.from_pretrained(directory))


def test_a_copy_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789012345678901234567890123456789"
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES))
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
    assert find_shape(Model(id="someone/model")).hidden == 64
    assert find_shape(Model(id="someone/model", revision=commit)).hidden == 64
    with pytest.raises(ConfigError, match=r"hf download someone/other config\.json --revision"):
        find_shape(Model(id="someone/other", revision=commit))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "names no architecture"),
        ({"model_type": "mamba"} | SIZES, "'mamba' are not known"),
        ({"model_type": "mixtral", "num_local_experts": 8} | SIZES, "mixtral is a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128} | SIZES, "mixture of experts"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "more than a language model"),
        ({"model_type": "llama"} | {key: value for key, value in SIZES.items() if key != "hidden_size"}, "lacks `hidden_size`"),
        ({"model_type": "llama"} | SIZES | {"num_hidden_layers": "3"}, "`num_hidden_layers` is '3', not a positive integer"),
        ({"model_type": "llama"} | SIZES | {"num_hidden_layers": 0}, "not a positive integer"),
        ({"model_type": "llama"} | SIZES | {"num_key_value_heads": True}, "not a positive integer"),
        ({"model_type": "llama"} | SIZES | {"tie_word_embeddings": "yes"}, "not true or false"),
    ],
)
def test_what_is_not_known_is_refused_with_a_fix(config: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        read_shape(config, "the/config.json")
    assert error.value.problems[0].fix
    assert error.value.problems[0].where == "the/config.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_shape(Model(id=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("./nowhere", "neither a directory nor a hub id"),
        ("builtin:else", "neither a directory"),
        ("a/b/c", "neither a directory"),
        ("no way/this", "not a hub id"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        find_shape(Model(id=name))


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_shape(Model(id=str(tmp_path)))


def test_the_shipped_models_need_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys; from finetune.config.schema import Model; from finetune.planning.lookup import find_shape;"
        "from finetune.planning import parameters;"
        f"assert find_shape(Model(id={BUILTIN!r})).total == 134_515_008;"
        "assert find_shape(Model(id='META-LLAMA/llama-2-7B-hf')).total == 6_738_415_616;"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real
def test_the_embedded_model_has_the_shapes_and_the_tokens_of_its_entry() -> None:
    from finetune.model.builtin import resolve_model
    from finetune.model.load import load_tokenizer

    directory, known = resolve_model(BUILTIN), find_shape(Model(id=BUILTIN))
    embedded = json.loads((directory / "config.json").read_text())
    assert dict(read_shape(embedded, "here").parameters()) == dict(known.parameters())
    assert known.tokens == len(load_tokenizer(directory)) == find_shape(Model(id=str(directory), new_tokens=("<a>",))).tokens


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_names_a_model_that_is_known(path: Path) -> None:
    assert find_shape(load_config(path).config.model).total > 1e8
