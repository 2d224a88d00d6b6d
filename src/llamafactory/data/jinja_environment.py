"""Compiles chat templates that come with models. They are foreign code: only Jinja's sandbox ever runs them."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from llamafactory.data.day import now
from llamafactory.extras.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import Template as CompiledJinja

MAX_TEMPLATE_CHARS = 1_000_000


class RefusedByTemplateError(Exception):
    """The template's own `raise_exception`, or a fault while it ran."""


@lru_cache(maxsize=8)
def compile_jinja(text: str) -> CompiledJinja:
    """The template, compiled in a sandbox with the names that transformers gives to chat templates.

    Raises:
        DataError: not valid Jinja, or absurdly long.
    """
    import jinja2

    if len(text) > MAX_TEMPLATE_CHARS:
        raise DataError("the tokenizer's chat template is too long", where="template", found=f"{len(text)} characters")
    try:
        return _environment().from_string(text)
    except jinja2.TemplateError as error:
        raise DataError(
            "the tokenizer's chat template is not valid Jinja",
            where="template",
            found=f"{error} (line {getattr(error, 'lineno', '?')})",
            fix="name a template, such as template: chatml",
        ) from error


def jinja_variables(text: str) -> frozenset[str]:
    """Names that a valid template may read without setting them itself, such as `enable_thinking`."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_environment().parse(text)))


@cache
def _environment() -> Environment:
    """Jinja's sandbox with the names that transformers gives to chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %} ... {% endgeneration %}` marks answers for other programs; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class GuardedNamespace(jinja2.utils.Namespace):
        """Jinja's namespace without private attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                GuardedNamespace._check_name(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            GuardedNamespace._check_name(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check_name(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not store the private name {name!r}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    own: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": _now, "namespace": GuardedNamespace}
    environment.globals.update(own)
    return environment


def run_jinja(compiled: CompiledJinja, variables: dict[str, Any]) -> str:
    """The text that the template writes.

    Raises:
        RefusedByTemplateError: the template refused its input or failed on it.
    """
    import jinja2

    try:
        return compiled.render(variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise RefusedByTemplateError(f"{type(error).__name__}: {error}") from error


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
