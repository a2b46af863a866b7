"""Text from strangers as a terminal may be given it."""

from __future__ import annotations


def shown(text: str, longest: int | None = None) -> str:
    r"""``text`` up to ``longest`` characters.

    Those that a terminal obeys (``\x1b``, marks that turn the direction of writing) or that have no encoding (half a surrogate pair) are
    written out.
    """
    cut = text if longest is None or len(text) <= longest else f"{text[:longest]}…"
    return cut if cut.isprintable() else "".join([each if each.isprintable() else _name(each) for each in cut])


def _name(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
