"""Rewrites a parsed template so that it pays for its work, and tells how far its output has come at each message."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context

from finetune.data.meter import Meter
from finetune.data.sandbox import Sandbox


def instrument(environment: Sandbox, tree: nodes.Template) -> None:
    """Loops and macros call the meter, and what Jinja offers no hook for becomes a filter."""
    calls = _Calls(environment.meter)
    # Names with a space cannot be written in a template, so none can call them.
    environment.filters |= {"a body": calls.body, "a turn": calls.turn, "a size": calls.sized, "a piece": calls.sliced}
    environment.filters |= {"a text": calls.joined, "a sum": calls.added, "a whole": calls.whole}
    _meter_bodies(tree, buffered=False)
    _meter_expressions(tree)


class _Calls:
    """What is put into a template. That each takes the context keeps Jinja from calling it once, while compiling."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @pass_context
    def body(self, _: Context, cost: int) -> str:
        """At the start of a body."""
        self._meter.charge(cost)
        return ""

    @pass_context
    def turn(self, _: Context, item: object, cost: int, loop: int) -> str:
        """At the start of a loop's body whose output is written at once: where its item begins, if that is a message."""
        meter = self._meter
        meter.charge(cost)
        number = meter.numbers.get(id(item))
        if number is not None:
            meter.seen.append((loop, number, meter.written))
        return ""

    @pass_context
    def sized(self, _: Context, value: Any, inside: bool) -> Any:
        """Around the right side of a comparison."""
        if not (inside and isinstance(value, dict)):  # a dict looks its keys up
            (self._meter.touch if isinstance(value, str) else self._meter.weigh)(value)
        return value

    @pass_context
    def whole(self, _: Context, value: Any) -> Any:
        """Around a list, tuple or dict that the template builds, so that none is larger than the budget, and around what is hashed."""
        self._meter.weigh(value)
        return value

    @pass_context
    def sliced(self, _: Context, value: Any) -> Any:
        """Around what is sliced."""
        self._meter.touch(value)
        return value

    @pass_context
    def joined(self, _: Context, values: list[Any]) -> str:
        """In place of `~`."""
        self._meter.weigh(values)
        return "".join(map(str, values))

    @pass_context
    def added(self, _: Context, values: list[Any]) -> Any:
        """In place of `+`."""
        if {*map(type, values)} == {str}:  # nearly always
            self._meter.charge((sum(map(len, values)) >> 3) + 1)
            return "".join(values)
        total = values[0]
        for value in values[1:]:
            self._meter.touch(total)
            self._meter.touch(value)
            total = total + value
        return total


def _meter_bodies(parent: nodes.Node, *, buffered: bool) -> None:
    """Put a call at the start of every body. Where output is ``buffered`` for later, no message's place can be seen."""
    for node in parent.iter_child_nodes():
        holds = buffered or isinstance(node, (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock))
        holds = holds or (isinstance(node, nodes.For) and node.recursive)
        _meter_bodies(node, buffered=holds)
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            cost = nodes.Const(_cost(node))
            call = _filter(cost, "a body")
            if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and not holds:
                call = _filter(nodes.Name(node.target.name, "load"), "a turn", cost, nodes.Const(id(node)))
            node.body.insert(0, nodes.ExprStmt(call))
            if isinstance(node, nodes.For) and node.test is not None:  # items that it rejects never reach the body
                node.test = nodes.Or(_filter(cost, "a body"), node.test)


def _cost(node: nodes.Node) -> int:
    """Nodes, and characters of text, that one turn of a body may go through."""
    return 1 + sum(len(item.data) if isinstance(item, nodes.TemplateData) else 1 for item in node.find_all(nodes.Node))


def _meter_expressions(parent: nodes.Node) -> None:
    for field, value in parent.iter_fields():
        if isinstance(value, list):
            for place, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    value[place] = _metered(item)
        elif isinstance(value, nodes.Node):
            setattr(parent, field, _metered(value))


def _metered(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Add):
        return _filter(nodes.List([_metered(term) for term in _terms(node)]), "a sum")
    _meter_expressions(node)
    match node:
        case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") if not _is_constant(node):
            return _filter(node, "a whole")
        case nodes.Pair() if not _is_constant(node.key):
            node.key = _filter(node.key, "a whole")
        case nodes.Compare() if not _is_constant(node.expr) and any(operand.op in ("in", "notin") for operand in node.ops):
            node.expr = _filter(node.expr, "a whole")
        case nodes.Concat():
            return _filter(nodes.List(node.nodes), "a text")
        case nodes.Getitem(arg=nodes.Slice()):
            node.node = _filter(node.node, "a piece")
        case nodes.Operand() if not _is_constant(node.expr):
            node.expr = _filter(node.expr, "a size", nodes.Const(node.op in ("in", "notin")))
    return node


def _is_constant(node: nodes.Node) -> bool:
    """Whether the source alone says how large it is."""
    match node:
        case nodes.List() | nodes.Tuple() | nodes.Dict():
            return all(map(_is_constant, node.items))
        case nodes.Pair():
            return _is_constant(node.key) and _is_constant(node.value)
    return isinstance(node, nodes.Const)


def _terms(node: nodes.Node) -> list[nodes.Node]:
    """The operands of `a + b + c`, which Jinja reads as `(a + b) + c`; in a loop, since hundreds may stand in a row."""
    terms = []
    while isinstance(node, nodes.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _filter(value: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None)
