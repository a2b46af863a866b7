"""Model cards: metadata that the hub's own library reads, nothing invented, and no text that becomes markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from finetune.card import Subject, base_license, card, code, use_adapter
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import ConfigError

SUBJECT = Subject(
    "adapter", "A sentence.", {"Validation loss": "1.5"}, "import peft", ("finetune train config.yaml",), losses={"loss": 1.5}
)
HOSTILE = "<script>alert(1)</script> `x` [y](javascript:z) | # | \n---\nlicense: mit\n"


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    """(**sections) -> a validated configuration."""

    def make(**sections: Any) -> Config:
        path = tmp_path / "run.yaml"
        (tmp_path / "data.jsonl").write_text("{}")
        settings: dict[str, Any] = {
            "model": {"id": "owner/base"},
            "data": {"train": [{"source": str(tmp_path / "data.jsonl")}]},
            "tuning": {"method": "lora", "rank": 4},
            "output": str(tmp_path / "run"),
        }
        path.write_text(json.dumps(settings | sections))
        return load_config(path).config

    return make


def test_the_hubs_library_reads_the_metadata(config_of: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n")
    revision = "a" * 40
    config = config_of(data={"train": [{"source": "hub:owner/name", "revision": revision}]})
    data = ModelCard(card(config, tmp_path, SUBJECT)).data
    assert data.base_model == "owner/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.to_dict()["library_name"] == "peft"
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert data.datasets == ["owner/name"]
    assert data.tags == ["finetune", "lora"]
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("loss", 1.5, "owner/name")


def test_nothing_is_invented(config_of: Callable[..., Config], tmp_path: Path) -> None:
    """No license where the base states none, no index of results and no path for local rows, no id for a local base."""
    base = tmp_path / "private" / "my-base"
    base.mkdir(parents=True)
    text = card(config_of(model={"id": str(base)}), base, SUBJECT)
    data = ModelCard(text).data.to_dict()
    assert {"license", "base_model", "base_model_relation", "datasets", "model-index"} & set(data) == set()
    assert "do not state a license" in text
    assert str(tmp_path) not in text
    assert "`data.jsonl`" in text


def test_a_base_whose_card_is_broken_is_an_error_with_a_place(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ConfigError, match="metadata of the base's card"):
        base_license(tmp_path, "owner/base")


def test_the_embedded_models_license_is_known(tmp_path: Path) -> None:
    assert base_license(tmp_path, "builtin:smollm2-135m") == {"license": "apache-2.0"}


def test_c10_text_from_elsewhere_stays_text(config_of: Callable[..., Config], tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "").replace("\n", " ")
    source = tmp_path / f"{name}.jsonl"
    source.write_text("{}")
    config = config_of(data={"train": [{"source": str(source)}]}, output=str(tmp_path / name), tuning={"method": "lora", "rank": 4})
    (tmp_path / "README.md").write_text(f"---\nlicense: {json.dumps(HOSTILE)}\n---\n")
    text = card(config, tmp_path, SUBJECT)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("\n---\n", 1)[1])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "javascript:z</a>" not in html
    assert "<a " not in html
    assert ModelCard(text).data.to_dict()["license"] == HOSTILE


@given(st.text())
def test_c10_a_code_span_holds_any_text(text: str) -> None:
    shown = code(text)
    assert "\n" not in shown
    [block] = [token for token in MarkdownIt("commonmark", {"html": True}).parse(f"a {shown} b") if token.type == "inline"]
    assert [token.type for token in block.children or ()] == ["text", "code_inline", "text"]


def test_the_commands_do_not_install_another_project(config_of: Callable[..., Config], tmp_path: Path) -> None:
    """The name of the program is another project's on the package index."""
    text = card(config_of(), tmp_path, SUBJECT)
    assert "pip install" not in text
    assert "finetune train config.yaml" in text
    assert "rank: 4" in text


def test_python_that_loads_an_adapter_is_python(config_of: Callable[..., Config]) -> None:
    settings = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    for quantization in (None, settings, {"load_in_8bit": True, "load_in_4bit": False}):
        source = use_adapter(config_of(model={"id": "o/b"}), "bfloat16", quantization)
        compile(source, "card", "exec")
        assert ("BitsAndBytesConfig(" in source) == (quantization is not None)
