"""A reader of YAML with the scalars of version 1.2, the place of every value, and nothing that can surprise.

`1e-4` is a number, `no` and `on` are strings, dates are strings. Duplicate keys, tags, merge keys, a second document, deep nesting and
alias bombs are errors. PyYAML does the tokens; its constructors, where the dangerous part lives, are never used.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import yaml

from finetune.config.tree import Document, Node, Place, Scalar
from finetune.errors import ConfigError, Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_VALUES = 20_000
"""Values after aliases are expanded. A real configuration has under two hundred."""

_INT = re.compile(r"[-+]?[0-9]{1,40}")
_OCTAL = re.compile(r"0o[0-7]{1,40}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}


def scalar(text: str) -> Scalar:
    """The value of an unquoted scalar by the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def read_text(path: Path) -> str:
    """The text of a configuration file, which must be small and UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the file: {error.strerror}", where=str(path), fix="check the path, and that it can be read"
        ) from None
    if len(data) > MAX_BYTES:
        fix = "name the YAML file that describes the run; data files go under data.train"
        raise ConfigError(f"this file is larger than a configuration can be ({MAX_BYTES // 1024} KiB)", where=str(path), fix=fix)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "this file is not UTF-8 text",
            where=f"{path}:{data[: error.start].count(10) + 1}",
            fix="save it as UTF-8, or name the YAML file",
        ) from None
    if "\0" in text:
        raise ConfigError("this is a binary file, not YAML", where=str(path), fix="name the YAML file that describes the run")
    return text


def compose(text: str, document: Document, *, column: int = 1) -> tuple[Node, list[Problem]]:
    """The values of a YAML text, and its duplicate keys; ConfigError where it cannot be read at all.

    ``column`` is where the text starts in the document's (only) line.
    """
    composer = _Composer(text, document, column - 1)
    try:
        node = composer.document_node()
    except yaml.YAMLError as error:
        problem = _syntax_problem(error, text, document, column - 1)
    else:
        return node, composer.problems
    raise ConfigError.from_problems([*composer.problems, problem])


class _Composer:
    """Turns PyYAML's events into nodes, within the limits."""

    def __init__(self, text: str, document: Document, offset: int) -> None:
        self.problems: list[Problem] = []
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._document = document
        self._offset = offset
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._values = 0

    def document_node(self) -> Node:
        node = Node(None, Place(self._document))
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._refuse(event, "a second document starts here", "keep one run a file: remove the `---` line and what follows")
                node = self._node(next(self._events), depth=1)
        return node

    def _node(self, event: yaml.Event, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._check(event, depth)
        start = self._values
        self._values += 1
        if isinstance(event, yaml.MappingStartEvent):
            node = Node(self._mapping(depth), self._place(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self._sequence(depth), self._place(event))
        else:
            node = self._scalar(event)
        anchor = getattr(event, "anchor", None)
        if anchor:
            self._anchors[anchor] = (node, self._values - start)
        return node

    def _check(self, event: yaml.Event, depth: int) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(event, "YAML tags (`!...`) are not allowed", "remove the tag: values are plain words, numbers, lists and mappings")
        if depth > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "a configuration has at most 5")
        self._check_size(event)

    def _check_size(self, event: yaml.Event) -> None:
        if self._values >= MAX_VALUES:
            self._refuse(event, f"more than {MAX_VALUES} values, counting what aliases repeat", "a configuration has under two hundred")

    def _alias(self, event: yaml.AliasEvent) -> Node:
        known = self._anchors.get(event.anchor or "")
        if known is None:  # also an alias inside its own anchor, which would be infinite
            self._refuse(event, f"the alias `*{event.anchor}` stands before or inside the value it repeats", "write the value out")
        node, size = known
        self._values += size
        self._check_size(event)
        return replace(node, at=self._place(event))

    def _sequence(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key, at = self._key(event), self._place(event)
            value = replace(self._node(next(self._events), depth + 1), key=at)
            if key in entries:
                first = entries[key].heading
                self.problems.append(
                    Problem(f"`{key}` is given twice; the first is on line {first.line}", str(at), "keep one of the two", at.excerpt())
                )
            entries[key] = value
        return entries

    def _key(self, event: yaml.Event) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, "a key must be a word", "write `key: value`")
        self._check(event, 1)
        self._check_text(event)
        if event.value == "<<" and event.implicit[0]:
            self._refuse(
                event, "merge keys (`<<`) are not part of YAML 1.2", "write the values out, or put them into a preset and use `extends`"
            )
        return str(event.value)

    def _scalar(self, event: yaml.Event) -> Node:
        assert isinstance(event, yaml.ScalarEvent)
        self._check_text(event)
        plain = event.implicit[0]  # quoted scalars are strings whatever they look like
        return Node(scalar(event.value) if plain else str(event.value), self._place(event))

    def _check_text(self, event: yaml.ScalarEvent) -> None:
        if any(0xD800 <= ord(character) <= 0xDFFF for character in event.value):
            self._refuse(event, "half a character (a lone surrogate) is not text", "remove the escape; \\U0001F600 writes a whole one")

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        assert mark is not None
        return Place(self._document, mark.line + 1, mark.column + 1 + self._offset)

    def _refuse(self, event: yaml.Event, what: str, fix: str) -> NoReturn:
        place = self._place(event)
        raise ConfigError.from_problems([*self.problems, Problem(what, str(place), fix, place.excerpt())])


_SYNTAX = (
    (r"'\\t'", "a tab stands where YAML wants spaces", "indent with spaces"),
    (r"special characters", "a control character", "remove it; the file must be plain text"),
    (r"but found '[\]},]'", "a bracket or comma that belongs to nothing", "remove it, or put the value into quotation marks"),
    (
        r"mapping values are not allowed",
        "a `:` that YAML cannot place",
        "write one key a line, indent keys of one section alike, and quote text that contains `: `",
    ),
    (
        r"expected <block end>",
        "this line does not line up with the ones before it",
        "indent the keys of one section by the same number of spaces",
    ),
    (r"<document start>", "the lines above already are a whole value", "write one key a line, without { } or [ ] around all of them"),
    (r"expected ',' or '[\]}]'", "a bracket is not closed, or a comma is missing", "close every [ and {, with commas between the entries"),
    (r"could not find expected ':'", "a key without `:`", "write `key: value`, with a space after the colon"),
    (r"escape", 'a `\\` that YAML does not know in a text in " "', "write `\\\\`, or use single quotation marks"),
    (r"quoted scalar|end of stream", "a quotation mark is not closed", "close the quotation mark"),
    (r"sequence entries", "a list begins in the middle of a line", "put each `- ` on a line of its own, or write `[a, b]`"),
    (r"chomping or indentation", "text follows `|` or `>`", "begin the text on the next line, or put it into quotation marks"),
    (r"directive", "a line begins with `%`", "remove it, or put the value into quotation marks"),
    (r"'[@`%|>*&!]'|an (alias|anchor)", "a value starts with a character that YAML reserves", "put the value into quotation marks"),
)
_ON_ONE_LINE = ("two values on one line", "write one key a line; entries between { } or [ ] are divided by commas")
_UNKNOWN_FIX = "write `key: value`, one key a line, and put text with special characters into quotation marks"


def _syntax_problem(error: yaml.YAMLError, text: str, document: Document, offset: int) -> Problem:
    """PyYAML's complaint in words that say what to do."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        place = Place(document, mark.line + 1, mark.column + 1 + offset)
    else:  # a reader error knows only its position in the text
        before = text[: getattr(error, "position", 0)]
        place = Place(document, before.count("\n") + 1, len(before) - before.rfind("\n") + offset)
    message = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable")
    context = str(getattr(error, "context", None) or "")
    if mark is not None and _follows_a_value(message, text, mark):
        return Problem(f"not valid YAML: {_ON_ONE_LINE[0]}", str(place), _ON_ONE_LINE[1], place.excerpt())
    for pattern, what, fix in _SYNTAX:
        if re.search(pattern, message) or re.search(pattern, context):
            return Problem(f"not valid YAML: {what}", str(place), fix, place.excerpt())
    return Problem(f"not valid YAML: {message}", str(place), _UNKNOWN_FIX, place.excerpt())


def _follows_a_value(message: str, text: str, mark: yaml.Mark) -> bool:
    """Whether something new begins where a value of the same line has just ended."""
    begins = re.search(r"expected (<block end>|'<document start>'), but found (?!'[\]}]')", message)
    return bool(begins and text.splitlines()[mark.line][: mark.column].strip(" -"))
