# ruff: noqa: E501 - templates are easier to read in one line
"""Our compilation of chat templates: it writes what transformers writes, and no template costs more than a fraction of a second."""

from __future__ import annotations

import resource
import time

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from finetune.data.template import ChatTemplate
from finetune.errors import DataError

TURNS = [{"role": "user", "content": "Say 'hi' <b>"}, {"role": "assistant", "content": "hi\nthere"}, {"role": "user", "content": "é"}]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"items": [1, {"é": None}]}}}]


def render(source: str, messages: list[dict[str, str]] | None = None, **more: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", **more}).render(messages or TURNS, TOOLS, ask=True, where="a.jsonl:1").text


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] ~ loop.index ~ 1.5 }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim | upper }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem.content + '|' + m.content }}{% endfor %}",
        "{% for m in messages[::-1] %}{{ loop.revindex0 }}{{ loop.length }}{{ m.nothing }}{{ m.content[:2] }}{% endfor %}",
        "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 2 * loop.index0 %}"
        "{% set ns.text = ns.text + m.content %}{% endfor %}{{ ns.n }} {{ ns.text }} {{ ns.n ** 2 }} {{ '%03d-%s' % (ns.n, 'x') }}",
        "{% macro show(m, mark='*') %}{{ mark }}{{ m.content }}{{ caller() if caller else '' }}{% endmacro %}"
        "{{ show(messages[0]) }}{% call show(messages[1], '-') %}!{% endcall %}",
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% for key, value in tools[0].items() %}{{ key }}={{ value }};{% endfor %}{{ tools[0].function.parameters['items'] | length }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ 'a-b'.split('-') | join('+') }}{{ ' x '.strip() }}{{ 'x'.replace('x', 'yy') }}{{ 'abc'.startswith('a') }}{{ '{:>5}'.format('a') }}",
        "{% set t %}{% for m in messages %}{{ m.content }},{% endfor %}{% endset %}{{ t | replace(',', ';') }}{{ t.rstrip(',') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% filter upper %}abc{% endfilter %}",
        "{{ 'yes' if 'x' in {'x': 1} and messages is iterable and messages is not string and bos_token in ['<s>'] else 'no' }}",
        "{{ dict(a=1, b='c') }}{{ range(3) | list }}{{ [1, 2] + [3] }}{{ (1, 'a') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ none }}{{ true }}",
        "{{ 'a' | default('b') }}{{ missing | default('b') }}{{ missing is defined }}{{ '<b>' | e }}{{ 'a\nb' | indent(2) }}{{ 2.567 | round(1) }}",
        "  {% if true %}  \n  x\n{% endif %}\n  y  {#- note -#}  \n",
    ],
)
def test_it_writes_what_transformers_writes(source: str) -> None:
    expected = _compile_jinja_template(source).render(
        messages=TURNS, tools=TOOLS, documents=None, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source) == expected


def test_every_message_is_placed_by_one_rendering() -> None:
    source = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}>>"
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(TURNS, ask=True, where="here")
    assert rendered.regions is not None
    assert [rendered.text[a:b] for a, b in rendered.regions] == ["<user>Say 'hi' <b>", "<assistant>hi\nthere", "<user>é.>>"]


@pytest.mark.parametrize(
    "source",
    [
        "{% macro all() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}{{ all() }}",
        "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ text }}",
        "{% filter trim %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}",
        "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
        "{% for i in range(messages | length) %}{{ messages[i].content }}{% endfor %}",
    ],
)
def test_a_template_that_writes_out_of_order_places_no_message(source: str) -> None:
    assert ChatTemplate(source, {}).render(TURNS, ask=False, where="here").regions is None


def test_the_date_is_the_same_every_day() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


LEAKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ (''|attr('__class__')) }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ['{0.__class__}'.format] | map('call', '') | list }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ['a'] | map('attr', '__class__') | list }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% for x in ().__class__.__bases__ %}{{ x }}{% endfor %}",
    "{{ (messages | first).update({'role': 'x'}) }}",
    "{{ messages.append(1) }}",
    "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ [1, 2] | random }}",
    "{{ lipsum(5) }}",
]


@pytest.mark.parametrize("source", LEAKS)
def test_c5_no_template_reaches_python(source: str) -> None:
    try:
        text = render(source)
    except DataError as error:
        text = str(error.problems[0].fix and "")
    assert text.strip() in ("", "[Undefined]")  # what the sandbox hides is undefined, and written as nothing


@pytest.mark.parametrize(
    "source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% from 'os' import path %}", "{% extends '/etc/passwd' %}"]
)
def test_c2_no_template_loads_another(source: str) -> None:
    with pytest.raises(DataError, match="no loader for this environment"):
        render(source)


NESTED = "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
LARGE = "{% set n = namespace(x=(1,)) %}{% for i in range(14) %}{% set n.x = (n.x, n.x) %}{% endfor %}"  # 16,384 numbers


BOMBS = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "one long loop": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loops over rejected items": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros that call twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "call blocks": "{% macro m(n) %}{% if n %}{% call m(n - 1) %}{% endcall %}{% call m(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loops": "{% for x in [[1]] recursive %}{{ loop([x]) }}{{ loop([x]) }}{% endfor %}",
    "blocks": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "string times number": "{{ 'a' * 9999999999 }}",
    "number times string": "{% set x = 999999999 * 'ab' %}",
    "list times number": "{{ ([0] * 999999999) | length }}",
    "doubling with +": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling in a block": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "doubling by str.join": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = ''.join([n.x, n.x]) %}{% endfor %}",
    "doubling by format": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "doubling by %": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "growing by replace": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
    "growing by str.replace": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested lists as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "nested lists compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
    "{% endfor %}{{ n.x == n.y }}",
    "a namespace printed": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n }}",
    "power": "{{ 9 ** 99999999 }}",
    "powers of powers": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "giant range": "{{ range(99999999999) | list }}",
    "many ranges": "{% for i in range(9999) %}{% if range(99999) | list %}{% endif %}{% endfor %}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "a wide number by star": "{{ '%*d' % (999999999, 1) }}",
    "a precise number": "{{ '%.999999999f' % 1 }}",
    "a wide field": "{{ '{:999999999}'.format(1) }}",
    "a wide field, nested": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "the format filter": "{{ '%999999999d' | format(1) }}",
    "str.center": "{{ 'a'.center(999999999) }}",
    "str.zfill": "{{ 'a'.zfill(999999999) }}",
    "str.ljust": "{{ 'a'.ljust(999999999) }}",
    "the center filter": "{{ 'a' | center(999999999) }}",
    "the indent filter": "{{ 'a\nb' | indent(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "translate": "{{ ('a' * 9999).translate({97: 'a' * 9999}) }}",
    "to_bytes": "{{ (5).to_bytes(999999999, 'big') }}",
    "batch": "{{ [1] | batch(999999999, 0) | list }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "tojson indent": "{{ [[1]] | tojson(indent=999999999) }}",
    "round": "{{ 1.5 | round(999999999) }}",
    "sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "much text in a loop": "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
    "much text in a buffer": "{% set t %}{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "long comparisons": "{% set x = 'a' * 99999 %}{% set y = x + 'b' %}{% for i in range(99999) %}{% if y in x %}{% endif %}{% endfor %}",
    "long slices": "{% set x = [0] * 99999 %}{% for i in range(99999) %}{% if x[1:] %}{% endif %}{% endfor %}",
    "long filters": "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{% if x | upper %}{% endif %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "many nested loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a long source": "{# " + "x" * 999_999 + " #}",
    "nested tuples as keys": NESTED + "{% set d = {n.x: 1} %}",
    "nested tuples looked up": NESTED + "{{ {}[n.x] }}",
    "nested tuples looked up by get": NESTED + "{{ {}.get(n.x) }}",
    "nested tuples looked for": NESTED + "{{ n.x in {} }}",
    "nested tuples in dict()": NESTED + "{{ dict([(n.x, 1)]) }}",
    "nested tuples made unique": NESTED + "{{ [n.x] | unique | list }}",
    "nested tuples grouped": NESTED + "{{ [n.x, n.x] | groupby(0) }}",
    "nested tuples sorted": NESTED + "{{ [n.x, n.x] | sort }}",
    "nested tuples joined": NESTED + "{{ n.x ~ '' }}",
    "nested tuples as text": NESTED + "{{ n.x | string }}",
    "nested tuples compared": NESTED + "{% set n.y = (n.x, 1) %}{{ n.y == (n.x, 2) }}",
    "arguments nested in varargs": "{% set n = namespace(x=(1,)) %}{% macro m() %}{% set n.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(n.x, n.x) }}{% endfor %}{{ {}.get(n.x) }}",
    "arguments nested in kwargs": "{% set n = namespace(x=(1,)) %}{% macro m() %}{% set n.x = kwargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(a=n.x, b=n.x) }}{% endfor %}{{ n.x == 1 }}",
    "items nested in a cycler": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = cycler(n.x, n.x).items %}{% endfor %}{{ {}[n.x] }}",
    "items of nested dicts": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=(n.x, n.x)).items() | first %}{% endfor %}{{ {}[n.x] }}",
    "nested deeper than the stack": "{% set n = namespace(x=(1,)) %}{% for i in range(99999) %}{% set n.x = (n.x,) %}{% endfor %}{{ {}[n.x] }}",
    "one large key, often": LARGE + "{% for i in range(99999) %}{{ {}[n.x] }}{% endfor %}",
    "one large key, often got": LARGE + "{% for i in range(99999) %}{{ {}.get(n.x) }}{% endfor %}",
    "one large key, often looked for": LARGE + "{% for i in range(99999) %}{{ n.x in {} }}{% endfor %}",
    "one large key in a long dict": LARGE + "{{ {" + ", ".join(["n.x: 1"] * 999) + "} }}",
    "one large name, often": LARGE + "{% for i in range(99999) %}{{ 1 | attr(n.x) }}{% endfor %}",
    "constants folded at compile time": "{{ ('a' * 99999999) | upper | length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_c5_template_bombs_stop_at_once(name: str) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        render(BOMBS[name])
    assert time.process_time() - started < 60, "half a second on a machine that does nothing else; hours without a limit"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "in KiB"
    problem = caught.value.problems[0]
    assert problem.where == "a.jsonl:1" or problem.where.startswith("chat template")
    assert problem.fix


def test_c5_a_bomb_stops_at_the_same_place_every_time() -> None:
    template = ChatTemplate("{% for a in messages %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}", {})
    for _ in range(2):
        with pytest.raises(DataError, match="stopped"):
            template.render(TURNS, ask=False, where="here")
    assert ChatTemplate("{{ messages | length }}", {}).render(TURNS * 999, ask=False, where="here").text == str(3 * 999)


def test_c5_a_long_conversation_is_no_bomb() -> None:
    source = "{% for m in messages %}{% for other in messages %}{% if other.role == 'tool' %}{{ 1 }}{% endif %}{% endfor %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 20}] * 500
    assert len(render(source, messages)) == 50_000


def test_c5_lists_that_templates_build_are_no_bombs() -> None:
    source = (
        "{% set ns = namespace(turns=[]) %}{% for m in messages %}{% set ns.turns = ns.turns + [{'n': loop.index, 'of': m}] %}{% endfor %}"
        "{% macro show(turn, other=none) %}{{ turn.of.content | length }}{% endmacro %}"
        "{% for turn in ns.turns %}{% if (turn.n, 1) in {(2, 1): 'x'} %}!{% endif %}{{ show(turn, other=messages) }},{% endfor %}"
    )
    assert render(source, [{"role": "user", "content": "word " * 20}] * 200) == "100,!" + "100," * 199


def test_what_a_template_says_is_cut_and_no_terminal_obeys_it() -> None:
    with pytest.raises(DataError) as caught:
        render("{{ raise_exception('\x1b]0;title\x07\u202e\x9b1m' ~ 'x' * 9000) }}")
    what = caught.value.problems[0].what
    assert what.startswith(r"the chat template refuses this conversation: \x1b]0;title\x07\u202e\x9b1mxxx")
    assert what.isprintable()
    assert len(what) < 300
