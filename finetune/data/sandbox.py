"""A Jinja sandbox in which every piece of work has a price, so that a hostile template stops at the same place on every machine.

A chat template comes with the model, from a stranger. Jinja's own sandbox keeps it away from Python's internals; nothing there limits
time or memory (pitfall C5). Here each loop turn, macro, call, filter and string operation is charged to a `Meter` BEFORE it happens:
one unit for a node of the template, one for eight characters, one for an element of a list. What no chat template needs and
what cannot be priced (random, translate, to_bytes, ...) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import do_join, do_replace, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from finetune.data.meter import Meter
from finetune.data.template_globals import ClosedNamespace, Dict, Generation, refuse, strftime

_WIDEST = 999  # columns of a formatted field, digits of a rounding
_LARGEST_BITS = 8192  # of an integer
_LONGEST_SEPARATOR = 64

_FREE = ("abs", "count", "d", "default", "first", "float", "int", "items", "last", "length")
_TOUCHED = ("list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
_WEIGHED = ("attr", "capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "truncate", "upper", "urlencode", "wordcount")
_SORTED = ("dictsort", "groupby", "max", "min", "sort", "unique")
# fmt: off
_PRICED_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt", "ne", "upper"
)

_STRING_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lower",
    "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
))
# fmt: on
_PADDING_METHODS = frozenset(("center", "ljust", "rjust", "zfill"))

_LOOP_ATTRIBUTES = frozenset(("first", "index", "index0", "last", "length", "nextitem", "previtem", "revindex", "revindex0"))
_DICT_ATTRIBUTES = frozenset(dir(dict))
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")


class _Formatter(SandboxedFormatter):
    """`str.format` that pays for every field."""

    def __init__(self, environment: Sandbox) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> str:
        """One field; SecurityError where it is wider than a screen."""
        _require_narrow(re.findall(r"\d+", format_spec))
        self._meter.weigh(value)
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """`!r` and `!s`."""
        self._meter.weigh(value)
        return super().convert_field(value, conversion)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers compiles chat templates in, with prices. One rendering at a time: the meter is shared."""

    intercepted_binops = frozenset(("*", "**", "%"))  # `+` and `~` are rewritten by finetune.data.instrument

    def __init__(self) -> None:
        self.meter = Meter()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], finalize=self._finalize, cache_size=0
        )
        self.filters = self._filters()
        self.tests |= {name: self._priced(cast(Callable[..., Any], self.tests[name]), self._weigh_all) for name in _PRICED_TESTS}
        kept = {name: self.globals[name] for name in ("cycler", "joiner", "range")}
        self.globals.clear()
        self.globals |= kept | {"dict": Dict(), "namespace": ClosedNamespace, "raise_exception": refuse, "strftime_now": strftime}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the parent's; without an exception for `message.role`, the commonest of all."""
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As the parent's, paying for the hash of a tuple; by a shorter way for `message['role']`."""
        if type(argument) is tuple:
            self.meter.weigh(argument)
        elif type(argument) is str and type(obj) is dict and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - a template may pass `self=`
        """Pay, then call."""
        __self.meter.charge(10)
        if isinstance(__obj, BuiltinMethodType | MethodType):
            owner = __obj.__self__
            if isinstance(owner, str):
                args = __self._string_method(owner, __obj.__name__, args)
            elif isinstance(owner, (int, float, bytes)):
                raise SecurityError(f"chat templates may not call {type(owner).__name__}.{__obj.__name__}")
            elif isinstance(owner, (list, tuple)):  # index and count compare
                __self.meter.weigh(owner)
            elif isinstance(owner, dict) and __obj.__name__ != "get":
                __self.meter.touch(owner)
        # A macro hands its arguments on; all else hashes, writes or keeps them, as `varargs` of a macro does in a new tuple.
        hands_on = isinstance(__obj, Macro) and not (__obj.catch_varargs or __obj.catch_kwargs)
        for value in (*args, *kwargs.values()):
            (__self.meter.touch if hands_on else __self.meter.weigh)(value)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Pay for the result's size before it is made."""
        match operator:
            case "*":
                self._pay_product(left, right)
            case "**":
                _require_small(left, right, lambda base, power: base.bit_length() * abs(power))
            case "%" if isinstance(left, str):
                self._pay_percent(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, with prices."""
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__
        if type(text) is not str:
            raise SecurityError("chat templates may not format |safe text")
        self.meter.touch(text)
        if value.__name__ == "format":
            return lambda *args, **kwargs: _Formatter(self).vformat(text, args, kwargs)
        return lambda mapping: _Formatter(self).vformat(text, (), mapping)

    def _finalize(self, value: Any) -> Any:
        if type(value) is str:
            self.meter.charge((len(value) >> 3) + 1)
        else:
            self.meter.weigh(value)
        return value

    def _string_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, which `join` must have read to know its price."""
        self.meter.touch(text)
        if name == "join" and args:
            items = list(args[0])
            self._pay_join(text, items)
            return (items, *args[1:])
        if name == "replace" and len(args) > 1:
            self._pay_replace(text, *args[:2])
        elif name in _PADDING_METHODS and args:
            _require_narrow([args[0]])
        elif name not in _STRING_METHODS:
            raise SecurityError(f"chat templates may not call str.{name}")
        return args

    def _pay_replace(self, text: str, old: Any, new: Any) -> None:
        text, old, new = str(text), str(old), str(new)
        self.meter.charge((len(text) + text.count(old) * len(new) >> 3) + 1)

    def _pay_join(self, separator: str, items: list[Any]) -> None:
        self.meter.weigh(items)
        self.meter.charge((len(separator) * len(items) >> 3) + 1)

    def _pay_product(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                self.meter.charge(len(value) * max(times, 0) + 1)
        _require_small(left, right, lambda one, other: one.bit_length() + other.bit_length())

    def _pay_percent(self, text: str, values: Any) -> None:
        fields = _PERCENT_FIELD.findall(text)
        _require_narrow([number for field in fields for number in field if number])
        for _ in range(max(len(fields), 1)):  # each field may write every value
            self.meter.weigh(values)

    def _weigh_all(self, values: Iterable[object]) -> None:
        for value in values:
            self.meter.weigh(value)

    def _filters(self) -> dict[str, Callable[..., Any]]:
        meter, known = self.meter, self.filters
        priced = {name: known[name] for name in _FREE}
        priced |= {name: self._priced(known[name], lambda values: meter.touch(values[0])) for name in _TOUCHED}
        priced |= {name: self._priced(known[name], self._weigh_all) for name in _WEIGHED}
        priced |= {name: self._priced(known[name], lambda values: self._weigh_all(values[:1] * 8)) for name in _SORTED}
        priced |= {"join": self._join, "replace": self._replace, "format": self._format, "tojson": self._tojson}
        priced |= {name: self._priced(known[name], self._pay_numbers) for name in ("indent", "round")}
        return priced

    def _priced(self, function: Callable[..., Any], price: Callable[[tuple[Any, ...]], None]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)  # which keeps Jinja's mark that the context is passed
        def paid(*args: Any, **kwargs: Any) -> Any:
            price((*args[first:], *kwargs.values()))
            return function(*args, **kwargs)

        return paid

    def _pay_numbers(self, values: tuple[Any, ...]) -> None:
        """`indent` and `round`: the text, and a number that says by how much it grows."""
        _require_narrow([value for value in values[1:] if isinstance(value, int)])
        for _ in range(1 + max((abs(value) if isinstance(value, int) else len(str(value)) for value in values[1:2]), default=4)):
            self.meter.weigh(values[0])

    @pass_eval_context
    def _join(self, context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self._pay_join(str(d), items)
        return str(do_join(context, items, d))

    @pass_eval_context
    def _replace(self, context: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        self._weigh_all((s, old, new))
        self._pay_replace(s, old, new)
        return do_replace(context, s, old, new, count)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        self.meter.weigh(value)
        self._pay_percent(str(value), kwargs or args)
        return str(value) % (kwargs or args)

    def _tojson(self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        """As transformers defines it: no HTML escapes."""
        spacing = [value for value in (indent, *(separators or ())) if value is not None]
        if any((len(value) if isinstance(value, str) else value) > _LONGEST_SEPARATOR for value in spacing):
            raise SecurityError("an indent or separator of tojson is longer than 64 characters")
        for _ in range(1 + _depth(x) if indent is not None else 1):  # each line is indented by its depth
            self.meter.weigh(x)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _require_narrow(numbers: Iterable[Any]) -> None:
    for number in numbers:
        if number == "*" or (str(number).lstrip("-").isdigit() and (len(str(number)) > 4 or abs(int(number)) > _WIDEST)):
            raise SecurityError(f"a width or precision of more than {_WIDEST} or of `*` is refused")


def _require_small(left: Any, right: Any, bits: Callable[[int, int], int]) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits(left, right) > _LARGEST_BITS:
        raise SecurityError(f"a number of more than {_LARGEST_BITS} bits is refused")


def _depth(value: Any) -> int:
    if isinstance(value, Mapping):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, (list, tuple)) else 0
