from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.formats import find_format
from llamafactory.data.records import RecordReader
from llamafactory.data.registry import find_spec
from llamafactory.data.row_error import RowError
from llamafactory.data.row_media import conversation_of, read_media, with_media
from llamafactory.data.types import Conversation, DatasetSpec, Media, Message
from llamafactory.extras.errors import DataError


def spec(folder: Path, **columns: str) -> DatasetSpec:
    return DatasetSpec(name="x", source="file", location="x", columns=columns, media_dir=str(folder))


def asked(text: str) -> Conversation:
    return Conversation(messages=(Message(role="user", content=text), Message(role="assistant", content="ok")))


@pytest.mark.parametrize(("name", "kind"), [("mllm_demo", "image"), ("mllm_video_demo", "video")])
def test_the_reference_rows_are_read_with_their_files(shared_dir: Path, name: str, kind: str) -> None:
    reader = RecordReader(spec=find_spec(name, str(shared_dir / "data")))
    records = [conversation_of(record) for _, record in reader]
    assert records
    assert not reader.lost
    assert all(media.kind == kind and Path(media.files[0]).is_file() for one in records for media in one.media)
    assert all(one.media for one in records)


def test_audio_rows_of_the_reference(shared_dir: Path) -> None:
    reader = RecordReader(spec=find_spec("mllm_audio_demo", str(shared_dir / "data")))
    assert {media.kind for _, record in reader for media in conversation_of(record).media} == {"audio"}


def test_training_says_that_it_cannot(shared_dir: Path) -> None:
    reader = RecordReader(spec=find_spec("mllm_demo", str(shared_dir / "data")), allows_media=False)
    with pytest.raises(DataError, match=r"demo\.json#1: images are not trained in this version(?s:.*)images\[0\]"):
        list(reader)


def test_paths_are_resolved_and_urls_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    row = {"images": ["a.png", "https://x/b.png", {"path": "a.png"}, {"bytes": b"123"}], "videos": "a.png"}
    record = asked("<image><image><image><image><video>")
    media = with_media(record, row, spec(tmp_path, images="images", videos="videos")).media
    own = (str(tmp_path / "a.png"),)
    assert [one.files for one in media] == [own, ("https://x/b.png",), own, (), own]
    assert media[3].content == b"123"
    assert [one.kind for one in media] == ["image"] * 4 + ["video"]


def test_a_list_of_paths_is_a_video_of_frames() -> None:
    assert read_media("video", ["1.jpg", "2.jpg"], "videos[0]") == Media(
        kind="video", column="videos[0]", files=("1.jpg", "2.jpg")
    )
    with pytest.raises(RowError, match="not an image"):
        read_media("image", ["1.jpg", "2.jpg"], "images[0]")


@pytest.mark.parametrize(
    ("text", "row", "field", "reason", "found"),
    [
        ("<image>", {"images": ["gone.png"]}, "images[0]", "the file is missing", "gone.png"),
        ("<image>", {"images": [7]}, "images[0]", "not an image", "the number 7"),
        ("<image>", {"images": [""]}, "images[0]", "not an image", 'the text ""'),
        (
            "<image> <image>",
            {"images": ["a"]},
            "images",
            "the placeholders <image> and",
            "2 <image> in the texts, and 1",
        ),
        ("no mark", {"images": ["a"]}, "images", "the placeholders <image> and", "0 <image> in the texts, and 1"),
        ("<image>", {}, "images", "the placeholders <image> and", "1 <image> in the texts, and 0"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, row: Any, field: str, reason: str, found: str) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(RowError) as caught:
        with_media(asked(text), row, spec(tmp_path, images="images"))
    assert caught.value.field == field
    assert caught.value.reason.startswith(reason)
    assert found in caught.value.found


def test_marks_in_rows_without_media_columns_are_text(tmp_path: Path) -> None:
    record = asked("what does <image> mean in HTML?")
    assert with_media(record, {}, spec(tmp_path)) is record


def test_parts_of_openai_messages_become_marks_and_entries(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    openai = find_format("openai")
    parts = [
        {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
        {"type": "text", "text": " and "},
        {"type": "image", "image": "a.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video"},
    ]
    row = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}],
        "videos": ["a.png"],
    }
    one = spec(tmp_path, messages="messages", videos="videos")
    one = DatasetSpec(
        name="x", source="file", location="x", columns=one.columns, tags=openai.DEFAULT_TAGS, media_dir=str(tmp_path)
    )
    record = with_media(openai.read_row(row, one, "x#1"), row, one)
    conversation = conversation_of(record)
    assert conversation.messages[0].content == "<image> and <image><audio><video>"
    assert [(media.kind, media.files) for media in conversation.media] == [
        ("image", ("https://x/a.png",)),
        ("image", (str(tmp_path / "a.png"),)),
        ("audio", ("data:;base64,AAAA",)),
        ("video", (str(tmp_path / "a.png"),)),
    ]
    assert conversation.media[1].column == "messages[0].content[2].image"
