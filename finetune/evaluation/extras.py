"""Libraries that only some tasks need."""

from __future__ import annotations

import importlib
from typing import Any

from finetune.errors import HardwareError

_INSTALL = "pip install 'finetune[eval]'"


def require(module: str, needed_by: str) -> Any:
    """The imported ``module`` of the extra `eval`; HardwareError with the install line where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise HardwareError(f"{needed_by} needs {error.name}, which is not installed", where="evaluation.tasks", fix=_INSTALL) from error
