"""What the user probably meant: the fix of every message about a key or a value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from finetune.config import peers, shape, unavailable
from finetune.config.allowed import join, words
from finetune.config.shape import Block, Choice, Leaf, Shape
from finetune.config.tree import KeyPath, Plain, dotted
from finetune.config.yaml12 import scalar

_PERCENT = re.compile(r"([0-9.]+)\s*%")
_THOUSANDS = re.compile(r"([0-9.]+)\s*[kK]")
_SWITCHES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

NOT_YET = "is not available in this version"


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that looks most like ``word``, or the only one that ``word`` begins, if there is one."""
    known = {_normal(candidate): candidate for candidate in candidates}
    found = difflib.get_close_matches(_normal(word), known, n=1, cutoff=cutoff)
    begun = [name for name in known if len(word) > 2 and name.startswith(_normal(word))]
    found = found or (begun if len(begun) == 1 else [])
    return known[found[0]] if found else None


def _normal(word: str) -> str:
    return word.lower().replace("_", "-").strip()


# --- keys ----------------------------------------------------------------------------------------------------------------------------


def for_key(path: KeyPath, plain: Plain) -> str:
    """What to write instead of an unknown key at ``path`` of a configuration ``plain``."""
    key = str(path[-1])
    if key == "extends":
        return "`extends` belongs to the top level of the file"
    section = shape.at(path[:-1], plain)
    siblings = _keys(section, path[:-1], plain)
    return (
        _other_member(section, key, path[:-1], plain)
        or _known_elsewhere(key)
        or _did_you_mean(key, siblings, cutoff=0.5 if len(key) < 5 else 0.7)
        or _belongs_to(key, path[:-1])
        or _did_you_mean(key, siblings, cutoff=0.55)
        or f"known here: {join(siblings, 'and')}"
    )


def _keys(section: Shape | None, path: KeyPath, plain: Plain) -> tuple[str, ...]:
    if isinstance(section, Choice) and not section.key:  # which kind is meant is not told by a word, so any of them may be
        return tuple(dict.fromkeys(key for member in section.distinct() for key in _keys(member, path, plain)))
    if isinstance(section, Choice):
        section = section.member(_value_at(plain, path))
    keys = tuple(section.entries) if isinstance(section, Block) else ()
    return keys if path else (*keys, "extends")


def _value_at(plain: Plain, path: KeyPath) -> Plain:
    value = plain
    for key in path:
        if isinstance(value, dict):
            value = value.get(str(key))
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key]
    return value


def _other_member(section: Shape | None, key: str, path: KeyPath, plain: Plain) -> str | None:
    """`rank` under `method: full` exists, but for another method."""
    if not isinstance(section, Choice) or not section.key:
        return None
    value = _value_at(plain, path)
    chosen = value.get(section.key) if isinstance(value, dict) else None
    tags = [tag for tag, member in section.members.items() if isinstance(member, Block) and key in member.entries]
    if not tags:
        return None
    return f"`{key}` goes with `{section.key}: {' | '.join(tags)}`, and `{section.key}` is `{chosen}` here"


def _known_elsewhere(key: str) -> str | None:
    name = key.lower().replace("-", "_")
    if name in unavailable.KEYS:
        reason = unavailable.REASONS.get(name)
        return f"`{key}` {NOT_YET}" + (f"; {reason}" if reason else "; remove the key")
    if name not in peers.KEYS:
        return None
    path, value = peers.KEYS[name]
    note = peers.NOTES.get(name)
    called = f"`{key}` is `{path}: {value}` here" if value else f"`{key}` is called `{path}` here"
    return called + (f" ({note})" if note else "")


def _did_you_mean(key: str, siblings: Iterable[str], *, cutoff: float) -> str | None:
    meant = nearest(key, siblings, cutoff=cutoff)
    return f"did you mean `{meant}`?" if meant else None


def _belongs_to(key: str, here: KeyPath) -> str | None:
    """The section that has this key, or one much like it."""
    homes: dict[str, list[str]] = {}
    for path, _, _ in shape.entries(shape.root()):
        if path[:-1] != here:
            home = dotted(path[:-1])
            homes.setdefault(str(path[-1]), []).append(home)
    meant = key if key in homes else nearest(key, homes, cutoff=0.8)
    if meant is None:
        return None
    sections = list(dict.fromkeys(home or "the top level" for home in homes[meant]))
    return f"`{meant}` belongs to {join(sections, 'or')}" + ("" if meant == key else "; did you mean that?")


# --- values --------------------------------------------------------------------------------------------------------------------------


def for_value(path: KeyPath, value: Plain, place: Shape | None) -> str:
    """What to write instead of a wrong value of the leaf at ``path``."""
    if isinstance(value, str):
        return _for_word(path, value, place) or _for_text(path, value, place) or _for_unit(path, value)
    return _for_word(path, str(value).lower(), place) or _for_number(value, place) or _for_unit(path, value)


def _generic(path: KeyPath) -> str:
    return dotted(tuple(0 if isinstance(key, int) else key for key in path)).replace("data.validation.0", "data.train.0")


def _for_word(path: KeyPath, word: str, place: Shape | None) -> str:
    generic, name = _generic(path), _normal(word)
    choices = tuple(place.members) if isinstance(place, Choice) else words(place)
    rephrased = peers.REPHRASED.get(generic, {}).get(name)
    if rephrased:
        return rephrased
    renamed = {_normal(key): meant for key, meant in peers.VALUES.get(generic, {}).items()}.get(name)
    if renamed:
        return f"`{word}` is called `{renamed}` here"
    if name in unavailable.VALUES.get(generic, ()):
        return f"`{word}` {NOT_YET}"
    meant = nearest(word, choices)
    return f"did you mean `{meant}`?" if meant else ""


def _for_text(path: KeyPath, text: str, place: Shape | None) -> str:
    if _is_number(place):
        return _numeric_text(text)
    if _holds(place, bool) and text.lower() in _SWITCHES:
        return f"write `{_SWITCHES[text.lower()]}`: in YAML 1.2 `{text}` is a word, not a switch"
    if _holds(place, bool) and text.lower() in ("true", "false"):
        return "remove the quotation marks"
    if path[-1] == "source":
        return "a dataset of the hub is `hub:owner/name`; its parts go under `subset` and `split`"
    if path[-1] == "revision":
        return "a branch or tag can move; give the 40 hexadecimal digits of a commit" + (", or null" if path[0] == "model" else "")
    return ""


def _numeric_text(text: str) -> str:
    if not isinstance(scalar(text), str):
        return "remove the quotation marks" if text.strip() else ""
    if percent := _PERCENT.fullmatch(text):
        return f"write the share: {float(percent[1]) / 100:g}"
    if thousands := _THOUSANDS.fullmatch(text):
        return f"write the number out: {float(thousands[1]) * 1000:g} or {float(thousands[1]) * 1024:g}"
    joined = re.sub(r"[_, ']", "", text)
    if joined.isdecimal():
        return f"write {joined}, without separators"
    leading = re.match(r"[0-9.eE+-]*[0-9]", text)
    return f"write the number alone: {leading[0]}" if leading and leading[0] != text else ""


def _for_number(value: Plain, place: Shape | None) -> str:
    if isinstance(value, bool) and _is_number(place):
        return "write a number"
    if isinstance(value, float) and value.is_integer() and _holds(place, int) and not _holds(place, float):
        return f"write {int(value)}, without a point or an exponent"
    if value is None and not _holds(place, type(None)):
        return "give a value, or remove the line"
    if isinstance(value, (int, float)) and isinstance(place, Leaf) and place.annotation is str:
        return f'put it into quotation marks: "{value}"'
    return ""


def from_the_schema(path: KeyPath) -> str:
    """The default and the meaning of the key at ``path``, or of the list around it, for values that nothing better can be said about."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    known = {_generic(known): entry for known, _, entry in reversed(list(shape.entries(shape.root())))}
    entry = known.get(_generic(path)) or known.get(_generic(path[:-1]))  # the latter: a name that the user chose
    if entry is None:
        return ""
    meaning = entry.doc.partition(". ")[0].rstrip(".")
    default = entry.default if not entry.required else None
    return f"the default is {default}: {meaning}" if isinstance(default, (bool, int, float, str)) else meaning


def _is_number(place: Shape | None) -> bool:
    return _holds(place, int) or _holds(place, float)


def _holds(place: Shape | None, kind: type) -> bool:
    return isinstance(place, Leaf) and _mentions(place.annotation, kind)


def _mentions(annotation: object, kind: type) -> bool:
    return annotation is kind or any(_mentions(part, kind) for part in getattr(annotation, "__args__", ()) if not isinstance(part, str))


_UNITS = {
    "learning_rate": "a learning rate is a small number: LoRA's best lies between 1e-5 and 1e-3",
    "warmup_ratio": "it is a share of all steps; for a number of steps use `schedule.warmup_steps`",
    "fraction": "it is a share of the training rows: 0.02 is 2 %",
    "max_grad_norm": "for no clipping write null",
    "lora_plus_ratio": "1 switches LoRA+ off; 16 is the paper's choice",
    "lr_ratio": "it multiplies optimizer.learning_rate; to freeze embeddings use `tuning.embeddings: frozen`",
    "patience": "to switch early stopping off write `early_stopping: null`",
    "every_steps": "null: at the end of each epoch",
    "epochs": "for less than one pass use `train.max_steps`",
    "max_steps": "null: as many as `train.epochs` gives",
    "weight": "to leave a source out, remove it",
}
_SHARES = frozenset({"dropout", "min_lr_ratio", "beta1", "beta2", "weight_decay"})


def _for_unit(path: KeyPath, value: Plain) -> str:
    name = str(path[-1])
    if name in _SHARES and isinstance(value, (int, float)) and 1 <= value <= 100:
        return f"it is a share, not a percentage: {value:g} % is {value / 100:g}"
    return _UNITS.get(name, "")
