"""What a template may still spend, what it has written, and where each message began."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

_DEEPEST = 200  # lists in lists; Python's own functions for them use the machine's stack, whose end ends the process


class OverBudgetError(SecurityError):
    """The template does more work than any chat template needs."""


class Meter:
    """What is left of the budget, how much was written, and where each message began."""

    __slots__ = ("left", "numbers", "seen", "written")

    def __init__(self) -> None:
        self.left = 0
        self.written = 0
        self.numbers: Mapping[int, int] = {}  # id() of a message's dict -> its place
        self.seen: list[tuple[int, int, int]] = []  # (loop, message, characters written before it)

    def start(self, budget: int, messages: Sequence[object] = ()) -> None:
        """Forget the last rendering."""
        self.left = budget
        self.written = 0
        self.numbers = {id(message): number for number, message in enumerate(messages)}
        self.seen = []

    def charge(self, units: int) -> None:
        """Take ``units``; OverBudgetError where the budget does not have them."""
        self.left -= units
        if self.left < 0:
            raise OverBudgetError("it loops, repeats or writes more than a chat template ever needs")

    def touch(self, value: object) -> None:
        """Charge for going once over ``value``, not over what its elements hold."""
        if isinstance(value, str):
            self.charge((len(value) >> 3) + 1)
        elif isinstance(value, (list, tuple, dict, range)):
            self.charge(len(value) + 1)
        else:
            self.charge(1)

    def weigh(self, value: object, depth: int = 0) -> None:
        """Charge for building, writing, comparing or hashing ``value`` with all it holds.

        A list that names itself twice, thirty times over, is long. SecurityError where lists stand more than 200 deep in each other.
        """
        if type(value) is str:
            self.charge((len(value) >> 3) + 1)
            return
        if isinstance(value, Namespace):
            raise SecurityError("a namespace can be neither printed, nor compared, nor put into a list")
        if depth > _DEEPEST:
            raise SecurityError(f"lists nest more than {_DEEPEST} deep")
        self.touch(value)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.weigh(key, depth + 1)
                self.weigh(item, depth + 1)
        elif isinstance(value, Collection) and not isinstance(value, (str, Undefined)):
            self.charge(3 * len(value))  # a step of Python each
            for item in value:
                self.weigh(item, depth + 1)
