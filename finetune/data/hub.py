"""Rows of a dataset of the Hugging Face hub, at a pinned commit, without its own code.

`datasets` (from version 4) runs no code of a repository and refuses those that need it. Where the hub cannot be reached it takes the latest
version that its cache holds, whatever commit was asked for: the commit of what was loaded is therefore checked here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.data import HubSource
from finetune.data.records import Row
from finetune.data.table_rows import batch_rows
from finetune.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

_BATCH_ROWS = 1000


Load = Callable[..., "datasets.Dataset"]
"""`datasets.load_dataset`, or what a test puts in its place."""


def read_hub(source: HubSource, load: Load | None = None) -> Iterator[Row | DataError]:
    """The rows of ``source``, from the memory map of its Arrow files; DataError where it cannot be had at its commit."""
    dataset = _loaded(source, load)
    where = f"{source.source}[{source.split}]"
    empty = True
    for row in batch_rows(_batches(dataset), where):
        empty = False
        yield row
    if empty:
        yield DataError("the split gives no row: it is empty", where=where, fix="choose another `split`")


def _batches(dataset: datasets.Dataset) -> Iterator[pyarrow.RecordBatch]:
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        yield from table.to_batches()


def _loaded(source: HubSource, load: Load | None) -> datasets.Dataset:
    name = source.source.removeprefix("hub:")
    if Path(name).exists():
        raise DataError(
            f"{name} is also a file or directory in the working directory, which `datasets` would read instead of the hub's",
            where=source.source,
            fix=f"start in another directory, or name it as `source: ./{name}`",
        )
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        dataset = (load or _load_dataset())(name, source.subset, split=source.split, revision=source.revision, keep_in_memory=False)
    except (ConnectionError, OfflineModeIsEnabled) as error:
        raise _out_of_reach(source, name, error) from error
    except (DatasetsError, HfHubHTTPError, RuntimeError, ValueError, LookupError, OSError) as error:
        raise _refused(source, error) from error
    _require_commit(dataset, source, name)
    return dataset


def _load_dataset() -> Load:
    import datasets

    loader: Load = datasets.load_dataset
    return loader


def _out_of_reach(source: HubSource, name: str, error: Exception) -> DataError:
    reason = "HF_HUB_OFFLINE is set" if _offline() else _first_line(error)
    return DataError(
        f"the hub cannot be reached ({reason}), and the dataset is not in the cache",
        where=source.source,
        fix=f"run `finetune data stats` once with a network, or fetch it with `hf download --repo-type dataset {name} "
        f"--revision {source.revision} --local-dir DIR` and name its files as `source: DIR/...`",
    )


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _refused(source: HubSource, error: Exception) -> DataError:
    reason = _first_line(error)
    if "scripts are no longer supported" in reason:
        return DataError(
            "the dataset consists of code, which is never run",
            where=source.source,
            fix="use one that holds data files (most have a converted copy on the branch refs/convert/parquet)",
        )
    return DataError(
        f"the dataset cannot be loaded: {reason}",
        where=f"{source.source}[{source.split}] at {source.revision}",
        fix="check the name, `revision`, `subset` and `split`, and your access (`hf auth login`)",
    )


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    text = str(cause).strip() or type(cause).__name__
    return text.split("\n", maxsplit=1)[0]


def _require_commit(dataset: datasets.Dataset, source: HubSource, name: str) -> None:
    """The directory of a cached dataset is named after the commit it was made from."""
    directories = {os.path.basename(os.path.dirname(file["filename"])) for file in dataset.cache_files}  # noqa: PTH119, PTH120
    other = sorted(directory for directory in directories if source.revision not in directory)
    if other or (len(dataset) and not directories):
        raise DataError(
            f"the cache holds another version of the dataset ({other[0] if other else 'in memory'}), and the hub gives none",
            where=f"{source.source} at {source.revision}",
            fix=f"run once with a network, or set `revision` to the cached commit, if {name} at that commit is what you want",
        )
