"""Settings of a process: what is silenced, and what is not."""

from __future__ import annotations

import warnings

import pytest

from finetune.process import prepare


@pytest.mark.parametrize(
    ("layer", "module", "shown"),
    [
        ("transformers.models.llama.modeling_llama.LlamaRMSNorm", "peft.tuners.tuners_utils", False),
        ("torch.nn.modules.conv.Conv3d", "peft.tuners.tuners_utils", True),
        ("some.LlamaRMSNorm", "other", True),
    ],
)
def test_only_pefts_complaint_about_norms_is_silenced(layer: str, module: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare()
        text = f"Unsupported layer type '<class '{layer}'>' encountered, proceed at your own risk."
        warnings.warn_explicit(text, UserWarning, "layer.py", 1, module=module)
    assert len(caught) == shown
