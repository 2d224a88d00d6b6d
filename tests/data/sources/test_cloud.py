"""Files in a bucket, against a real S3 protocol on this machine: moto's server."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from llamafactory.data.sources import cloud, read_source
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

ROWS = [{"a": "x"}, {"a": "ü"}]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of a server with the bucket `rows`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    put(f"{address}/rows", b"")
    put(f"{address}/rows/one.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode())
    put(f"{address}/rows/folder/b.json", json.dumps(ROWS[1:]).encode())
    put(f"{address}/rows/folder/a.json", json.dumps(ROWS[:1]).encode())
    put(f"{address}/rows/mixed/a.json", b"[]")
    put(f"{address}/rows/mixed/b.csv", b"a\nx\n")
    yield address
    server.stop()


def put(address: str, content: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
    with urllib.request.urlopen(urllib.request.Request(address, data=content, method="PUT", headers=headers)):
        pass


@pytest.fixture(autouse=True)
def _environment(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def read(url: str) -> list[Any]:
    return [(row.origin, row.values) for row in read_source(DatasetSpec(name="x", source="cloud", location=url))]


def test_a_file_and_a_folder() -> None:
    assert read("s3://rows/one.jsonl") == [("one.jsonl:1", ROWS[0]), ("one.jsonl:2", ROWS[1])]
    assert read("s3://rows/folder") == [("a.json#1", ROWS[0]), ("b.json#1", ROWS[1])]


def test_credentials_are_used_where_access_without_them_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    asked: list[Any] = []
    original = fsspec.filesystem

    def filesystem(protocol: str, **options: Any) -> Any:
        asked.append(options)
        if options.get("anon"):
            raise PermissionError("Access Denied")
        return original(protocol, **options)

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    assert len(read("s3://rows/one.jsonl")) == 2
    assert asked == [{"anon": True}, {}]


def test_what_is_not_there_and_what_is_mixed() -> None:
    with pytest.raises(DataError, match=r"s3://rows/gone\.json: the file in the cloud cannot be read(?s:.*)FileNotF"):
        read("s3://rows/gone.json")
    with pytest.raises(DataError, match=r"several types in one folder(?s:.*)\.csv, \.json"):
        read("s3://rows/mixed")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "is_installed", lambda name: False)
    with pytest.raises(DataError, match=r'needs the package gcsfs(?s:.*)pip install "llamafactory\[gcs\]"'):
        cloud.check_cloud_url("gs://bucket/rows.json")
    with pytest.raises(DataError, match=r'needs the package s3fs(?s:.*)pip install "llamafactory\[s3\]"'):
        cloud.check_cloud_url("s3://bucket/rows.json")
