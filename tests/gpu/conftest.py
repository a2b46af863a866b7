"""Each test runs on the CPU, with a stand-in for the kernel that only GPUs have, and on an NVIDIA GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune.model import attention, head, packing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false here"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def flash(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packed attention through torch's kernel for sequences of varying length, on the CPU a stand-in; the tokens of each call."""
    from torch.nn.attention import varlen

    calls: list[int] = []
    real = varlen.varlen_attn if device.type == "cuda" else _each_alone

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(query))
        return real(query, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setitem(attention.KERNELS, "cpu", attention.KERNELS["cuda"])
    for module in (packing, head):  # rows are filled up for the CPU's products alone
        monkeypatch.setattr(module, "compiles", lambda _: False)
    return calls


def _each_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch.nn.attention.varlen documents of its kernel, in its shapes (t, heads, d), one sequence at a time."""
    assert window_size == (-1, 0), "causal"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    found = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        rows = [part[start:end].transpose(0, 1)[None] for part in (query, key, value)]
        attended = functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)
