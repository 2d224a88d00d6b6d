from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import BaseFileLock, FileLock
from hypothesis import given
from hypothesis import strategies as st

from llamafactory import cli
from llamafactory.data.kept_rows import KeptRows, choose_unneeded, find_kept, note_size, remove
from llamafactory.data.table import ShardBuilder
from llamafactory.data.token_cache import TokenCache, TokenCaches
from llamafactory.extras.errors import ConfigError

DAY = 86_400.0
NOW = 1_800_000_000.0


def keep(root: Path, name: str, *, days: float, is_complete: bool = True) -> TokenCache:
    """A tokenised data set without rows that was used so many days ago."""
    cache = TokenCache(folder=root / f"{name}-key", parts={"rows": name}, use="train", name=name)
    with cache.only_writer():
        cache.seal(0, ShardBuilder().build(), {"num_rows": 0})
        if is_complete:
            cache.finish(1, [])
    for path in cache.folder.iterdir():
        os.utime(path, (NOW - days * DAY,) * 2)
    return cache


def test_what_is_kept_is_found_the_latest_first(tmp_path: Path) -> None:
    keep(tmp_path, "old", days=9)
    keep(tmp_path, "new", days=1)
    keep(tmp_path, "stopped", days=5, is_complete=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    for files in ((".lock",), (".lock", "manifest.json"), (".lock", "manifest.json", "000000.safetensors")):
        folder = tmp_path / f"another program's {len(files)}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    found = find_kept(tmp_path)
    assert [(one.name, one.is_complete) for one in found] == [("new", True), ("", False), ("old", True)]
    assert all(one.num_bytes == sum(path.stat().st_size for path in one.folder.iterdir()) for one in found)
    assert find_kept(tmp_path / "nowhere") == []


def test_names_of_any_letters_have_folders_of_their_own(tmp_path: Path) -> None:
    caches = TokenCaches(root=tmp_path, is_named=True)
    names = ("rows", "数据", "训练", "a b", "a_b", "../a", "..")
    folders = [caches.find("train", name, {}).folder for name in names]
    assert folders[0].name == "train-rows"
    assert len({str(folder) for folder in folders}) == len(names)
    assert {folder.parent for folder in folders} == {tmp_path}


def test_reading_is_a_use(tmp_path: Path) -> None:
    cache = keep(tmp_path, "old", days=900)
    assert cache.load() is not None
    assert find_kept(tmp_path)[0].last_used > NOW - 900 * DAY


@given(
    ages=st.lists(st.tuples(st.floats(0, 50), st.integers(0, 1000)), max_size=8),
    days=st.none() | st.floats(0, 50),
    limit=st.none() | st.integers(0, 4000),
)
def test_the_limits_are_kept_and_no_more_goes_than_they_ask(
    ages: list[tuple[float, int]], days: float | None, limit: int | None
) -> None:
    kept = [
        KeptRows(folder=Path(str(n)), name="", use="", num_bytes=size, last_used=NOW - age * DAY, is_complete=True)
        for n, (age, size) in enumerate(ages)
    ]
    chosen = choose_unneeded(kept, unused_days=days, max_bytes=limit, now=NOW)
    left = [one for one in kept if one not in chosen]
    assert limit is None or sum(one.num_bytes for one in left) <= limit
    for one in left:
        assert days is None or one.last_used >= NOW - days * DAY
        assert all(one.last_used >= other.last_used for other in chosen)
    if chosen:
        latest = chosen[-1]
        is_old = days is not None and latest.last_used < NOW - days * DAY
        assert is_old or (limit is not None and sum(one.num_bytes for one in [*left, latest]) > limit)


def test_only_own_files_go_and_never_beside_a_writer(tmp_path: Path) -> None:
    first, second = keep(tmp_path, "a", days=2), keep(tmp_path, "b", days=1)
    (second.folder / "notes.txt").write_text("mine")
    with FileLock(first.folder / ".lock"):
        assert [remove(one) for one in find_kept(tmp_path)] == [True, False]
    assert first.load() is not None
    assert [path.name for path in second.folder.iterdir()] == ["notes.txt"]
    assert remove(find_kept(tmp_path)[0])
    assert not first.folder.exists()


def test_who_waits_for_a_folder_that_is_removed_makes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = keep(tmp_path, "a", days=2)
    acquired = TokenCache._acquired
    times: list[int] = []

    def late(self: TokenCache) -> BaseFileLock:
        lock = acquired(self)
        times.append(1)
        if len(times) == 1:  # what another process removes while this one waits
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
        return lock

    monkeypatch.setattr(TokenCache, "_acquired", late)
    with cache.only_writer():
        cache.seal(0, ShardBuilder().build(), {"num_rows": 0})
        assert (cache.folder / ".lock").exists()
    assert len(times) == 2
    assert cache.has(0)


def test_the_command_lists_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, "old", days=5000)
    cli.main(["data", "cache", "--folder", str(tmp_path)])
    assert "old (train)" in capsys.readouterr().out
    for words in (["prune", "--unused-days", "3000", "--dry-run"], ["prune", "--max-gb", "1"]):
        assert cli.main(["data", "cache", *words, f"--folder={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 data sets" in shown
    assert "would go" in shown
    assert "0 of 1 data sets" in shown
    assert len(find_kept(tmp_path)) == 1
    cli.main(["data", "cache", "prune", "--max-gb=0", "--json", "--folder", str(tmp_path)])
    removed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in removed["removed"]] == ["old"]
    assert not removed["dry_run"]
    assert find_kept(tmp_path) == []


def test_the_folder_is_that_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMAFACTORY_TOKEN_CACHE", raising=False)
    keep(tmp_path / "tokens", "rows", days=5)
    config = tmp_path / "train.yaml"
    config.write_text(f"cache_dir: {tmp_path}\nmodel_name_or_path: any\n")
    for words in ([str(config)], ["list", f"cache_dir={tmp_path}"], [f"tokenized_path={tmp_path / 'tokens'}"]):
        assert cli.main(["data", "cache", *words]) == 0
        assert f"1 data sets, 0.0 MB in {tmp_path / 'tokens'}" in capsys.readouterr().out
    assert cli.main(["data", "cache", "prune", "--max-gb=0", str(config)]) == 0
    assert find_kept(tmp_path / "tokens") == []


def test_much_that_is_kept_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, "rows", days=5)
    note_size(tmp_path)
    assert capsys.readouterr().err == ""
    note_size(tmp_path, most=10)
    assert f"data cache prune --max-gb 1e-08 --folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "no limit is given"),
        (["purge"], "unknown word"),
        (["prune", "--max-gb", "much"], "a number from 0 up"),
        (["prune", "--unused-days", "nan"], "a number from 0 up"),
        (["--dry-run"], "is for prune"),
        (["list", "more"], "unknown word"),
    ],
)
def test_wrong_words_remove_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    from llamafactory.commands.data_cache import main

    keep(tmp_path, "old", days=5000)
    with pytest.raises(ConfigError, match=message):
        main([*words, "--folder", str(tmp_path)])
    assert len(find_kept(tmp_path)) == 1


@pytest.mark.parametrize("words", [["cachedir=here"], ["cache_dir=here", "--folder", "there"]])
def test_a_word_that_would_be_passed_over_removes_nothing(words: list[str], tmp_path: Path) -> None:
    from llamafactory.commands.data_cache import main

    words = [word.replace("here", str(tmp_path)) for word in words]
    with pytest.raises(ConfigError, match="give one place"):
        main(["prune", *words, "--max-gb", "1000"])
