"""The tag and the functions that chat templates expect beside Jinja's own, as transformers defines them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells a template: the default date of Llama 3's own template. A run must not depend on its day (ADR 0008)."""

_LONGEST_FORMAT = 200  # characters


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for other libraries. Here it is a plain scope: it writes straight through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        """The body alone."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Dict:
    """`dict(...)` of a template, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class ClosedNamespace(Namespace):
    """`namespace(...)`; names with an underscore lead into Python and are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}: names with an underscore are refused")


def refuse(message: str) -> None:
    """`raise_exception`: TemplateError with the template's own words."""
    raise TemplateError(message)


def strftime(format: str) -> str:  # noqa: A002 - the name that templates use
    """`strftime_now`, on the fixed day; SecurityError for widths, which the C library would pad to."""
    if len(format) > _LONGEST_FORMAT or re.search(r"%[^a-zA-Z%]*\d", format):
        raise SecurityError("strftime_now takes a short format without widths")
    return TODAY.strftime(format)
