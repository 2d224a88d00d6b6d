"""2026-11-23: peft 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 calls deprecated on every wrap.

Upstream: `peft/peft_model.py`, `PeftModel.__init__`. Delete when peft's floor in pyproject.toml reads
`is_activation_checkpointing`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_future_warning() -> Iterator[None]:
    """Silences that one warning while a model is wrapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
