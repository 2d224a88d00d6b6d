"""Near matches for a mistyped name: keys, values, templates, datasets, models, commands."""

from __future__ import annotations

from collections.abc import Iterable


def near_matches(word: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """The names that `word` was probably meant to be, best first; case and `-` versus `_` do not count.

    A name that starts with `word` (or the other way round) also counts, behind those that are spelled alike.
    """
    import difflib

    by_form: dict[str, str] = {}
    for name in candidates:
        by_form.setdefault(_plain_form(name), name)
    form = _plain_form(word)
    cutoff = 0.6 if len(form) <= 4 else 0.7  # two letters swapped in a short word
    found = difflib.get_close_matches(form, by_form, n=limit, cutoff=cutoff)
    if len(form) >= 4:
        related = [name for name in sorted(by_form, key=len) if name.startswith(form) or form.startswith(name + "_")]
        found += [name for name in related if name not in found]
    return [by_form[f] for f in found[:limit]]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`did you mean 'x'?`, `did you mean 'x' or 'y'?`, or an empty text where nothing is near."""
    names = [f"'{name}'" for name in near_matches(word, candidates)]
    if not names:
        return ""
    return f"did you mean {names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' or ' + names[-1]}?"


def _plain_form(name: str) -> str:
    return name.casefold().replace("-", "_")
