"""One layer of configuration over another."""

from __future__ import annotations

from finetune.config import shape
from finetune.config.shape import Choice, Shape, Table
from finetune.config.tree import Node


def merge(base: Node, upper: Node, known: Shape | None) -> Node:
    """``upper`` over ``base``: mappings merge, everything else is replaced.

    A union that changes its member is replaced as a whole, so that no field of the other member leaks in. A name of a table that the user
    chose, such as a group of `optimizer.groups`, is removed with null.
    """
    if not isinstance(base.content, dict) or not isinstance(upper.content, dict) or _changes_member(base, upper, known):
        return upper
    merged = dict(base.content)
    keys = {**base.plain_keys(), **upper.plain_keys()}
    for key, node in upper.content.items():
        if isinstance(known, Table) and node.content is None and key in merged:
            del merged[key]
            continue
        inner = shape.inner(known, key, keys)
        merged[key] = merge(merged[key], node, inner) if key in merged else node
    place = base if upper.at.document.kind == "override" else upper
    return Node(merged, place.at, place.key)


def _changes_member(base: Node, upper: Node, known: Shape | None) -> bool:
    if not isinstance(known, Choice):
        return False
    # judged together: one key of a source, without the name that tells its kind, belongs to the kind that is there
    below, above = known.member(base.plain()), known.member({**base.plain_keys(), **upper.plain_keys()})
    return below is not None and above is not None and below is not above
