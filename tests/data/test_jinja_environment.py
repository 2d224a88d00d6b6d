from __future__ import annotations

import pytest
from jinja2.exceptions import SecurityError

from llamafactory.data.jinja_environment import RefusedByTemplateError, compile_jinja, run_jinja
from llamafactory.extras.errors import DataError


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_refuses(attack: str) -> None:
    with pytest.raises(RefusedByTemplateError, match="SecurityError"):
        run_jinja(compile_jinja(attack), {"messages": []})
    assert issubclass(SecurityError, Exception)


def test_names_that_chat_templates_use() -> None:
    text = (
        "{%- set ns = namespace(a=1) -%}{%- set ns.a = 2 -%}{{ ns.a }}|{{ {'k': 'ü<'} | tojson }}|"
        "{% generation %}{% set ns.a = 3 %}g{% endgeneration %}|{{ ns.a }}|"
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}|"
        "{{ strftime_now('%Y') | length }}"
    )
    assert run_jinja(compile_jinja(text), {}) == '2|{"k": "ü<"}|g|3|1|4'


def test_a_refusal_of_the_template_keeps_its_words() -> None:
    with pytest.raises(RefusedByTemplateError, match="only users here"):
        run_jinja(compile_jinja("{{ raise_exception('only users here') }}"), {})


def test_an_absurdly_long_template_is_not_compiled() -> None:
    with pytest.raises(DataError, match="too long"):
        compile_jinja("x" * 1_000_001)
