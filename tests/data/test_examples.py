"""Examples on disk and in memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.examples import SCHEMA, Examples, Flat, open_table
from finetune.data.render import Example


def made(count: int) -> list[Example]:
    return [Example(tuple(range(n, 2 * n + 2)), (False, *(m % 2 == 0 for m in range(n + 1))), f"file:{n}") for n in range(count)]


def on_disk(path: Path, examples: list[Example], batch: int) -> Examples:
    with pa.ipc.new_file(str(path), SCHEMA) as file:
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            file.write_batch(Flat.of(part).record_batch([example.where for example in part]))
    flat = Flat.of(examples)
    memory = Examples.of(examples)
    assert memory.lengths.tolist() == [len(example.ids) for example in examples]
    return Examples(open_table(path), memory._rows, memory.lengths, flat.supervised())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    examples = made(23)
    for found in (Examples.of(examples), on_disk(tmp_path / "rows.arrow", examples, batch=5)):
        assert list(found) == examples
        assert found[-1] == examples[-1]
        assert [found.where(n) for n in range(23)] == [example.where for example in examples]
        assert found.supervised.tolist() == [example.supervised for example in examples]
        assert isinstance(found[3].ids[0], int)
        assert isinstance(found[3].mask[1], bool)


@given(st.tuples(*[st.none() | st.integers(-12, 12)] * 2, st.sampled_from([None, 1, 2, 3, -1, -2])))
def test_a_slice_is_that_of_a_list(bounds: tuple[int | None, int | None, int | None]) -> None:
    examples, cut = made(9), slice(*bounds)
    found = Examples.of(examples)[cut]
    assert list(found) == examples[cut]
    assert found.lengths.tolist() == [len(example.ids) for example in examples[cut]]
    assert found.supervised.tolist() == [example.supervised for example in examples[cut]]


def test_an_index_beyond_the_end_is_refused() -> None:
    found = Examples.of(made(3))
    with pytest.raises(IndexError):
        found[3]
    assert not Examples.of([])
    assert list(Examples.of([])) == []


def test_a_view_of_a_view_reads_the_same_file(tmp_path: Path) -> None:
    examples = made(20)
    found = on_disk(tmp_path / "rows.arrow", examples, batch=6)
    assert list(found[4:][::3][1:]) == examples[4:][::3][1:]
