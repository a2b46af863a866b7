"""What building a model takes for a while, by glibc's own account of its heap; in a process of its own, which keeps what is freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")

ACCOUNT = """
import ctypes
from finetune.process import prepare
prepare()
import torch
from finetune.model.heap import freed_at_once, return_freed_memory

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Account

def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def work():
    kept = []
    for _ in range(20):
        large = torch.ones(2**20)
        kept.append(torch.ones(2**12))
        del large
    return kept
"""


def printed(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", ACCOUNT + code], capture_output=True, text=True, check=True, timeout=120)
    return [int(line) for line in done.stdout.split()]


def test_large_tensors_have_pages_of_their_own_inside_and_none_afterwards() -> None:
    code = """
before = libc.mallinfo2().hblks
with freed_at_once():
    large, small = torch.ones(2**20), torch.ones(2**8)
    inside = libc.mallinfo2().hblks
    del large
    freed = libc.mallinfo2().hblks
again = torch.ones(2**20)
print(inside - before, freed - before, libc.mallinfo2().hblks - before)
"""
    assert printed(code) == [1, 0, 0]


def test_what_was_taken_for_a_while_is_the_systems_again() -> None:
    """20 tensors of 4 MiB, each freed beside one of 16 KiB that stays."""
    kept, least = 20 * 2**14, 4 * 2**20
    code = """
first = own()
with freed_at_once():
    kept = work()
inside = own()
heap = [torch.ones(2**18) for _ in range(40)] + work()
del heap[:40]
full = own()
return_freed_memory()
print(inside - first, full - own())
"""
    grown, returned = printed(code)
    assert grown < kept + least
    assert returned > 30 * 2**20
