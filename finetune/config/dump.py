"""A validated configuration as YAML: for the run directory, where it loads again, and for `config show`, with origins as comments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from finetune.config.schema import Config
from finetune.config.tree import KeyPath, Plain, dotted
from finetune.config.yaml12 import scalar

_PLAIN_TEXT_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ/._")
_PLAIN_TEXT = _PLAIN_TEXT_FIRST | frozenset("0123456789-+=~@")


def dump_config(config: Config) -> str:
    """Every value, defaults included, as YAML that loads to the same configuration."""
    return "".join(f"{text}\n" for text, _ in _lines(_dumped(config), ()))


def show_config(config: Config, origins: Mapping[str, object], reasons: Mapping[str, str] | None = None) -> str:
    """The same, with the origin of each value - and the reason for each "auto", where known - as comments."""
    rendered = [(text, _comment(path, origins, reasons or {})) for text, path in _lines(_dumped(config), ())]
    column = min(44, max(len(text) for text, comment in rendered if comment) + 2)
    return "".join(f"{text.ljust(column)}  # {comment}\n" if comment else f"{text}\n" for text, comment in rendered)


def leaves(config: Config) -> dict[KeyPath, Plain]:
    """Every value that holds no other value; a list of words or numbers is one value."""
    return flat(_dumped(config))


def flat(value: Plain) -> dict[KeyPath, Plain]:
    """The same of plain values that no schema was laid over."""
    return dict(_walk(value, ()))


def _dumped(config: Config) -> Plain:
    plain: Plain = config.model_dump(mode="json")
    return plain


def _comment(path: KeyPath | None, origins: Mapping[str, object], reasons: Mapping[str, str]) -> str:
    if path is None:
        return ""
    name = dotted(path)
    reason = f"; {reasons[name]}" if name in reasons else ""
    return f"{origins.get(name, 'default')}{reason}"


def _is_leaf(value: Plain) -> bool:
    if isinstance(value, dict):
        return not value
    return not isinstance(value, list) or not any(isinstance(item, dict) for item in value)


def _walk(value: Plain, path: KeyPath) -> Iterator[tuple[KeyPath, Plain]]:
    if _is_leaf(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))


def _lines(value: Plain, path: KeyPath, indent: str = "") -> Iterator[tuple[str, KeyPath | None]]:
    """Each line, with the path of the leaf that it states."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        inner: KeyPath = (*path, key)
        head = f"{indent}{_text(key)}:" if isinstance(key, str) else f"{indent}-"
        if _is_leaf(item):
            yield f"{head} {_inline(item)}", inner
        elif isinstance(key, str):
            yield head, None
            yield from _lines(item, inner, indent + "  ")
        else:
            yield from _list_entry(item, inner, indent)


def _list_entry(item: Plain, path: KeyPath, indent: str) -> Iterator[tuple[str, KeyPath | None]]:
    """The keys of a mapping in a list: the first stands beside the dash."""
    for number, (text, inner) in enumerate(_lines(item, path, indent + "  ")):
        yield (f"{indent}- {text[len(indent) + 2 :]}" if number == 0 else text), inner


def _inline(value: Plain) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, dict):
        return "{}"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """A string without quotation marks where YAML reads it as the same string, else as JSON, which is YAML too."""
    plain = text[:1] in _PLAIN_TEXT_FIRST and set(text) <= _PLAIN_TEXT | {":"} and not text.endswith(":") and scalar(text) == text
    return text if plain and text else f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    """A character inside quotation marks: JSON's escapes would cut what lies beyond U+FFFF into surrogates, which YAML forbids."""
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
