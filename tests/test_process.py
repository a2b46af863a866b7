"""Settings of a process: what is silenced, and what is not; what libraries leave in memory is searched for garbage where others use it."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize(("own", "frozen"), [(False, False), (True, True)])
def test_only_a_process_of_ones_own_forgets_what_was_there(own: bool, frozen: bool) -> None:
    """A caller's objects must stay collectable; and the search rests while libraries are loaded, not longer."""
    script = f"""
import gc, weakref
from finetune import process
class Node: pass
node = Node(); node.itself = node
if {own}:
    process.own()
with process.loading():
    inside = gc.isenabled()
gone = weakref.ref(node)
del node
gc.collect()
print(inside, gc.isenabled(), gc.get_freeze_count() > 0, gone() is not None)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True", str(frozen), str(frozen)]


def test_garbage_of_an_earlier_stage_is_not_kept() -> None:
    script = """
import gc, weakref
from finetune import process
class Node: pass
process.own()
node = Node(); node.itself = node
gone = weakref.ref(node)
del node
with process.loading(): pass
print(gone() is None)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_search_that_was_off_stays_off() -> None:
    script = "import gc; from finetune import process; gc.disable()\nwith process.loading(): pass\nprint(gc.isenabled())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_a_library_has_compiled_waits_for_its_first_call() -> None:
    """The compiler takes half a second to load; afterwards torch.compile is itself again, and what was decorated computes what it did."""
    script = """
import sys
from finetune import process
process.own()
with process.loading():
    import torch
    import bitsandbytes
    inside = torch.compile

    @torch.compile(dynamic=False, backend="eager")
    def double(x):
        "Twice x."
        return 2 * x

print("torch._inductor.compile_fx" in sys.modules, torch.compile is inside, double.__doc__, double(torch.ones(2)).tolist())
print(double(torch.ones(2)).tolist(), torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["False False Twice x. [2.0, 2.0]", "[2.0, 2.0] 1"]
