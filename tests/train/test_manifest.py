"""Whatever stands in a manifest, a folder is either whole or has a fault that is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamafactory.train.checkpoint.folders import newest_checkpoint
from llamafactory.train.checkpoint.manifest import MANIFEST, find_fault, read_facts, seal, size_of
from llamafactory.train.run_index import read_run

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
NAMES = st.sampled_from(["weights.bin", "part/weights.bin", ".", "..", "/etc/passwd", "a\0b", "\ud800", "x" * 300])
ENTRIES = st.fixed_dictionaries({}, optional={"size": SCALARS, "sha256": SCALARS}) | DOCUMENTS
MANIFESTS = st.fixed_dictionaries(
    {"files": st.dictionaries(NAMES, ENTRIES, max_size=3) | DOCUMENTS}, optional={"run_id": DOCUMENTS}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint-1"
    made.mkdir()
    (made / "weights.bin").write_bytes(b"12345")
    return made


@pytest.fixture
def sealed(folder: Path) -> Path:
    seal(folder, {"run_id": "a", "step": 1})
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS | MANIFESTS)
def test_any_json_but_that_of_seal_is_a_fault(folder: Path, document: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(document))
    fault = find_fault(folder)
    assert fault is not None
    assert fault.isprintable()
    assert isinstance(read_facts(folder), dict)
    assert size_of(folder) >= 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_the_manifest_is_never_an_error_of_ours(sealed: Path, data: st.DataObject) -> None:
    whole = (sealed / MANIFEST).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    try:
        cut = data.draw(st.booleans())
        changed = whole[:place] if cut else whole[:place] + data.draw(st.binary(max_size=2)) + whole[place + 1 :]
        (sealed / MANIFEST).write_bytes(changed)
        fault = find_fault(sealed)
        assert fault is None or MANIFEST in fault or "weights.bin" in fault or " is missing" in fault
    finally:
        (sealed / MANIFEST).write_bytes(whole)
    assert find_fault(sealed) is None
    assert size_of(sealed) == 5


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it has no list of files"),
        (["weights.bin"], "it has no list of files"),
        ({"weights.bin": 5}, "what it says of weights.bin has no size and sha256"),
        ({"weights.bin": {"size": True, "sha256": ""}}, "what it says of weights.bin has no size and sha256"),
        ({"../weights.bin": {"size": 5, "sha256": ""}}, "'../weights.bin' is no name of a file in this folder"),
    ],
)
def test_a_malformed_entry_is_named(folder: Path, files: object, said: str) -> None:
    (folder / MANIFEST).write_text(json.dumps({"run_id": "a", "files": files}))
    assert find_fault(folder) == f"MANIFEST.json is damaged: {said}"


def test_deeply_nested_json_is_damage(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)
    assert (find_fault(folder) or "").startswith("MANIFEST.json is damaged")


def test_a_damaged_manifest_breaks_neither_the_list_of_runs_nor_the_checkpoint_before(sealed: Path) -> None:
    damaged = sealed.with_name("checkpoint-2")
    damaged.mkdir()
    (damaged / MANIFEST).write_text(json.dumps({"run_id": "a", "step": [], "files": {"weights.bin": None}}))
    assert newest_checkpoint(sealed.parent, "a") == sealed
    (sealed.parent / "run.json").write_text(json.dumps({"run_id": "a", "state": "failed", "config": {}}))
    run = read_run(sealed.parent)
    assert [(one.name, one.size, one.fault is None) for one in run.checkpoints] == [
        ("checkpoint-1", 5, True), ("checkpoint-2", 0, False),
    ]  # fmt: skip
    (sealed.parent / "run.json").write_text("[]")
    assert read_run(sealed.parent).state == "damaged"
