"""Plain tables of figures."""

from __future__ import annotations

from rich.table import Table


def figures_table(first: str, *headings: str) -> Table:
    """A table without lines: a column of text, which is folded where the terminal is narrow, and columns of numbers, which never are."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
