"""What tokenised rows are kept under: the content of everything that decides them, and no path.

The key is made of named parts, so that a mismatch can say which part differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from hashlib import file_digest, sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.data.encoded_rows import RowEncoder
from llamafactory.data.records import RecordReader, hashable
from llamafactory.data.sources import SourceFile, list_files, read_source
from llamafactory.data.types import DatasetSpec, Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LIBRARIES = ("tokenizers", "jinja2", "numpy")
_ROWS, _READING = "rows", "reading of the rows"
_CODE = Path(__file__).resolve().parent


def key_parts(reader: RecordReader, rows: RowEncoder) -> dict[str, str]:
    """The parts of a data set's key, named as people know them. Reads the rows' bytes, but renders nothing.

    Raises:
        DataError: the files are not there, or cannot be read.
    """
    return {_ROWS: rows_digest(reader.spec), _READING: _reading(reader), **method_parts(rows)}


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """Sha256 of the rows and of how they are picked and read, whatever is made of them."""
    return sha256(f"{parts[_ROWS]}\n{parts[_READING]}".encode()).hexdigest()


def method_parts(rows: RowEncoder) -> dict[str, str]:
    """The parts that do not depend on the rows: tokenizer, template, options, program."""
    reading = rows.reading
    return {
        **text_parts(rows.encoder.backend, reading.template),
        "stage": rows.view.name,
        "cutoff_len": "any" if rows.view.name == "text" and reading.joins_text else str(reading.cutoff_len),
        "overlong": rows.overlong,
        "train_on": reading.mask.train_on,
        "train_on_prompt": str(reading.mask.train_on_prompt).lower(),
        "rewritten_history": reading.mask.rewritten_history,
        "end of a text": reading.end_token,
        "program": code_digest(),
    }


def text_parts(backend: Tokenizer, template: Template) -> dict[str, str]:
    """The parts that make text of conversations, and ids of text."""
    return {
        "tokenizer": _digest(backend.to_str()),
        "template": f"{template.name} ({_digest(_json(template.identity))})",
    }


def key_of(parts: Mapping[str, str]) -> str:
    """A short name for the parts together."""
    return _digest(_json(parts))[:24]


def rows_digest(spec: DatasetSpec) -> str:
    """Sha256 of the content of all rows that the data set has: of a file its bytes, else of the rows as they come."""
    digest = sha256()
    if spec.source == "file":
        for file in list_files(Path(spec.location)):
            with SourceFile.at(file).open() as opened:
                stream: Any = opened
                digest.update(f"{file.suffix.lower()} {file_digest(stream, 'sha256').hexdigest()}\n".encode())
    else:
        for row in read_source(spec):
            digest.update(hashable(row))
            digest.update(b"\n")
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Sha256 of this package's source and of the versions of the libraries that make ids of text."""
    digest = sha256()
    for file in sorted(_CODE.rglob("*")):
        if file.suffix in {".py", ".toml"}:
            digest.update(f"{file.relative_to(_CODE).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name} {metadata.version(name)}\n".encode())
    return digest.hexdigest()[:16]


def _reading(reader: RecordReader) -> str:
    """How the rows of the source are picked and read."""
    spec = reader.spec
    return _json(
        {
            "formatting": spec.formatting,
            "ranking": spec.is_ranking,
            "columns": spec.columns,
            "tags": spec.tags,
            "split": spec.split,
            "num_samples": None if spec.num_samples is None else [spec.num_samples, reader.seed],
            "max_samples": reader.max_samples,
            "data_variables": reader.variables,
        }
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=dict)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
