"""Images, videos and audios of a row: which files they are, and whether each has its place in the text.

Nothing here opens a file. Bytes that a row carries itself are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from llamafactory.data.row_error import RowError, describe, read_text
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Media, MediaKind, Message, Preference, Scored

PLACEHOLDERS: Mapping[MediaKind, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
_COLUMNS: Mapping[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audios"}
_EXPECTED = "a path, a URL, an object with bytes, or a list of such"
_RecordT = TypeVar("_RecordT", bound=Conversation | Preference | Feedback | Scored)


def with_media(record: _RecordT, row: Mapping[str, object], spec: DatasetSpec) -> _RecordT:
    """The record with what the media columns of its row name, paths resolved.

    Raises:
        RowError: a missing file, another shape, or more or fewer placeholders than files.
    """
    columns: dict[MediaKind, str] = {kind: name for kind, key in _COLUMNS.items() if (name := spec.columns.get(key))}
    prompt = conversation_of(record)
    if not columns and not prompt.media:
        return record
    listed = [_resolve(media, spec.media_dir) for media in prompt.media if not _only_marks_a_place(media, columns)]
    for kind, name in columns.items():
        for place, value in enumerate(_as_list(row.get(name))):
            field = f"{name}[{place}]"
            listed.append(_resolve(read_media(kind, value, field), spec.media_dir))
    if not listed and not any(
        mark in message.content for message in prompt.messages for mark in PLACEHOLDERS.values()
    ):
        return record
    answers = ((record.chosen,), (record.rejected,)) if isinstance(record, Preference) else ((),)
    for answer in answers:
        _check_places([*prompt.messages, *answer], listed, columns)
    return _with_prompt(record, replace(prompt, media=tuple(listed)))


def _only_marks_a_place(media: Media, columns: Mapping[MediaKind, str]) -> bool:
    """Whether a content part brings no file itself, because a column does.

    Raises:
        RowError: there is no such column.
    """
    if media.files or media.content is not None:
        return False
    if media.kind not in columns:
        raise RowError(
            "a content part without its file",
            field=media.column,
            found="nothing",
            expected=_EXPECTED,
            fix=f"or name the column of the files: columns: {{{_COLUMNS[media.kind]}: ...}}",
        )
    return True


def conversation_of(record: Conversation | Preference | Feedback | Scored) -> Conversation:
    """The conversation that holds the record's media."""
    match record:
        case Preference():
            return record.prompt
        case Feedback() | Scored():
            return record.conversation
        case _:
            return record


def read_media(kind: MediaKind, value: object, field: str) -> Media:
    """One entry: a path or URL, an object with bytes or a path, or (for videos) a list of frames.

    Raises:
        RowError: another shape.
    """
    match value:
        case str() if value.strip():
            return Media(kind=kind, column=field, files=(read_text(value, field),))
        case bytes():
            return Media(kind=kind, column=field, content=value)
        case {"bytes": bytes() as content}:
            return Media(kind=kind, column=field, content=content)
        case {"path": str() as path} | {"url": str() as path}:
            return Media(kind=kind, column=field, files=(read_text(path, field),))
        case list() if value and kind == "video" and all(isinstance(frame, str) and frame for frame in value):
            return Media(kind=kind, column=field, files=tuple(value))
        case None | str() | bool() | int() | float() | list() | Mapping():
            raise RowError(f"not {_article(kind)}", field=field, found=describe(value), expected=_EXPECTED)
        case _:  # what `datasets` decoded, an image of pillow say
            return Media(kind=kind, column=field, content=value)


def _article(kind: MediaKind) -> str:
    return f"a {kind}" if kind == "video" else f"an {kind}"


def _as_list(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _resolve(media: Media, folder: str | None) -> Media:
    if not media.files:
        return media
    return replace(media, files=tuple(_resolve_file(name, folder, media.column) for name in media.files))


def _resolve_file(name: str, folder: str | None, field: str) -> str:
    if name.startswith(("http://", "https://", "data:")) or folder is None:
        return name
    path = Path(folder) / name.removeprefix("file://")
    if not path.is_file():
        raise RowError(
            "the file is missing",
            field=field,
            found=f"no file {path}" if len(str(path)) <= 200 else f"no such file, {describe(name)}",
            expected="a file in media_dir (the folder of dataset_info.json unless it is set)",
            fix="set media_dir to the folder in which the paths of the rows begin",
        )
    return str(path)


def _check_places(messages: Iterable[Message], media: Iterable[Media], columns: Mapping[MediaKind, str]) -> None:
    texts = [message.content for message in messages]
    listed = list(media)
    for kind, mark in PLACEHOLDERS.items():
        num_files = sum(one.kind == kind for one in listed)
        if not num_files and kind not in columns:
            continue
        num_marks = sum(text.count(mark) for text in texts)
        if num_marks != num_files:
            raise RowError(
                f"the placeholders {mark} and the files do not match",
                field=columns.get(kind, _COLUMNS[kind]),
                found=f"{num_marks} {mark} in the texts, and {num_files} files",
                expected=f"one {mark} for each {kind}, where it belongs in the text",
            )


def _with_prompt(record: _RecordT, prompt: Conversation) -> _RecordT:
    if isinstance(record, Preference):
        return cast(_RecordT, replace(record, prompt=prompt))
    if isinstance(record, Feedback | Scored):
        return cast(_RecordT, replace(record, conversation=prompt))
    return cast(_RecordT, prompt)
