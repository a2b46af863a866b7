"""What a valid configuration still needs from the outside."""

from __future__ import annotations

import glob
from pathlib import Path

from finetune.config.schema import Config, FileSource


def missing_sources(config: Config) -> list[str]:
    """One sentence for each data source that is not there (training would fail with exit code 3)."""
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    sources = [source.source for source in (*config.data.train, *validation) if isinstance(source, FileSource)]
    return [f"{source} does not exist yet; training needs it" for source in sources if not _exists(source)]


def _exists(source: str) -> bool:
    if any(character in source for character in "*?["):
        return any(glob.iglob(source, recursive=True))  # noqa: PTH207 - the pattern is absolute
    return Path(source).exists()
