"""What a check reports."""

from __future__ import annotations

from finetune.config.tree import KeyPath


class Finding:
    """Something that cannot work, and the paths whose values make it so; the error points to the first."""

    __slots__ = ("fix", "paths", "what")

    def __init__(self, what: str, fix: str, *paths: KeyPath) -> None:
        self.what = what
        self.fix = fix
        self.paths = paths
