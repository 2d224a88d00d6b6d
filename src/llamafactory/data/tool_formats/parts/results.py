"""Results of several calls in one observation."""

from __future__ import annotations

from collections.abc import Sequence

from llamafactory.data.types import Piece


def join_with(separator: str, results: Sequence[str]) -> list[Piece]:
    """Results as row text, the separator between them as markup."""
    pieces: list[Piece] = []
    for number, result in enumerate(results):
        pieces += [Piece(separator)] if number else []
        pieces.append(Piece(result, is_literal=True))
    return pieces
