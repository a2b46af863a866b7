"""Measure an adapter in a process of its own.

    python -m finetune.merging.adapter_reload ADAPTER PROBE RESULT DEVICE BASE DTYPE QUANTIZATION

The process loads the base with plain transformers and the adapter with plain PEFT, as a user of the export would. DTYPE is the type the
base is loaded in, QUANTIZATION the JSON of bitsandbytes' settings, or `null`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.merging.reload import Probe, measure


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process; prints what is wrong with the adapter and returns 6 where tensors are missing, left over or changed."""
    adapter, probe, result, device, base, dtype, quantization = arguments
    model = loaded(base, Path(adapter), device, getattr(torch, dtype), json.loads(quantization))
    wrong = unlike_the_file(model, Path(adapter))
    if wrong:
        sys.stderr.write(f"{wrong[0]} and {len(wrong) - 1} more tensors are not loaded as they are in the file\n")
        return 6
    found = measure(model.eval(), Probe.load(Path(probe)), device)
    save_file({"logits": found.logits, "loss": torch.tensor(found.loss, dtype=torch.float64)}, result)
    return 0


def loaded(base: str, adapter: Path, device: str, dtype: torch.dtype, quantization: dict[str, Any] | None) -> Any:
    """The ``adapter`` on its ``base``, loaded as a user would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig.from_dict(quantization) if quantization else None,
        device_map={"": device},
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else bitsandbytes rounds the weights a second time on some CPUs; see `finetune.model.quantize`
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, adapter, local_files_only=True)


def unlike_the_file(model: Any, adapter: Path) -> list[str]:
    """Names of the tensors that the file of ``adapter`` and ``model`` do not share."""
    from peft import get_peft_model_state_dict

    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(adapter / "adapter_model.safetensors")
    return sorted(
        name
        for name in live.keys() | stored.keys()
        if name not in live or name not in stored or not torch.equal(live[name].cpu().float(), stored[name].float())
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
