"""What else is wrong in a section whose kind is misspelt or missing: told as if it said what was meant, so that no second try is needed.

Where it cannot be told what was meant, only what would be wrong whichever kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from finetune.config import shape
from finetune.config.hints import nearest
from finetune.config.shape import Choice, Shape
from finetune.config.translate import Complaint
from finetune.config.tree import KeyPath, Node, replace_at

Look = Callable[[Node], list[Complaint]]
"""What the schema refuses of a tree."""
_GUESSED = "did you mean"
"""In a fix that names the nearest word."""


def complaints_throughout(tree: Node, look: Look, top: Shape | None = None) -> list[Complaint]:
    """What ``look`` refuses of ``tree``, also inside sections whose kind is wrong. ``top``: its shape, else that of a configuration."""
    return _throughout(tree, look, top or shape.root(), (), frozenset())


def _throughout(tree: Node, look: Look, top: Shape, inside: KeyPath, supposed: frozenset[KeyPath]) -> list[Complaint]:
    """The same of what lies at or below ``inside``, where the kind of the sections ``supposed`` is one that there is."""
    found = {complaint.path: complaint for complaint in look(tree) if complaint.path[: len(inside)] == inside}
    for path in [complaint.path for complaint in found.values()]:
        place = path[:-1]
        choice, section = shape.at(place, tree.plain(), top), tree.find(place)
        if place in supposed or not isinstance(choice, Choice) or path[-1:] != (choice.key,):
            continue
        if section is not None and isinstance(section.content, dict):
            known = supposed | {place}
            tries = [_throughout(replace_at(tree, place, meant), look, top, place, known) for meant in _meant(section, choice)]
            for further in _in_all(tries):
                found.setdefault(further.path, further)
    return list(found.values())


def _meant(section: Node, choice: Choice) -> Iterator[Node]:
    """``section`` with the word for its kind that was probably meant, or with each there is."""
    assert isinstance(section.content, dict)
    content = dict(section.content)
    told = content.pop(choice.key, None)
    if told is None and (close := nearest(choice.key, section.plain_keys(), cutoff=0.7)):
        told = content.pop(close)
    words = [shape.tags_of(choice, member)[0] for member in choice.distinct() if isinstance(member, shape.Block)]
    if told is not None and isinstance(told.content, str) and (word := nearest(told.content, choice.members)):
        words = [word]
    place = told or section
    for word in words:
        yield Node({**content, choice.key: Node(word, place.at, place.key)}, section.at, section.key)


def _in_all(tries: Sequence[list[Complaint]]) -> list[Complaint]:
    """What is wrong at the same place in every one of ``tries``, with the fix that knows best what was meant."""
    by_place = [{(complaint.path, complaint.kind): complaint for complaint in found} for found in tries]
    shared = [place for place in by_place[0] if all(place in known for known in by_place)]
    return [min((known[place] for known in by_place), key=lambda one: _GUESSED not in one.problem.fix) for place in shared]
