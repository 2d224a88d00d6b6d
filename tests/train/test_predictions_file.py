"""The file of predictions after a crash, and beside another run's."""

from __future__ import annotations

import json

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.train.predictions_file import MADE_OF, NAME, PredictionsFile

LINES = [{"predict": f"Antwort {number} 很好\u2028"} for number in range(6)]


def opened(folder, made_of="model", num_rows=6, starts_afresh=False):
    return PredictionsFile(folder, {"weights": made_of}, num_rows=num_rows, starts_afresh=starts_afresh)


def test_lines_are_plain_text_and_whole(tmp_path):
    file = opened(tmp_path)
    file.write(0, LINES[:4])
    file.write(4, LINES[4:])
    content = (tmp_path / NAME).read_bytes()
    assert "Antwort 5 很好".encode() in content
    assert content.count(b"\n") == 6
    assert list(file.lines()) == LINES


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_that_was_cut_anywhere_goes_on_behind_its_last_whole_line(tmp_path, cut):
    opened(tmp_path).write(0, LINES)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-cut])
    file = opened(tmp_path)
    assert file.num_lines == whole[:-cut].count(b"\n")
    file.write(0, LINES[:4])  # a chunk that is there in part
    file.write(4, LINES[4:])
    assert (tmp_path / NAME).read_bytes() == whole


def test_zeros_that_a_loss_of_power_left_are_no_lines(tmp_path):
    opened(tmp_path).write(0, LINES[:3])
    with (tmp_path / NAME).open("ab") as file:
        file.write(bytes(40) + b"\n{}\n")
    assert opened(tmp_path).num_lines == 3
    assert list(opened(tmp_path).lines()) == LINES[:3]


def test_lines_of_something_else_are_refused_and_kept(tmp_path):
    opened(tmp_path).write(0, LINES)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(ConfigError, match=r"weights: model there, other now[\s\S]*overwrite_output_dir: true"):
        opened(tmp_path, "other")
    (tmp_path / MADE_OF).unlink()
    with pytest.raises(ConfigError, match="no generated_predictions.meta.json beside it"):
        opened(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before


def test_another_batch_size_goes_on_and_is_said(tmp_path, capsys):
    for size in (8, 8, 4):
        batching = {"batch_size": size, "num_processes": 1}
        file = PredictionsFile(tmp_path, {"weights": "a"}, num_rows=6, starts_afresh=False, batching=batching)
        said = "were made with batch_size 8, num_processes 1, and new ones are with batch_size 4, num_processes 1"
        assert (said in capsys.readouterr().err) == (size == 4)
        file.write(0, LINES[:3])
    assert file.num_lines == 3
    assert json.loads((tmp_path / MADE_OF).read_text())["batching"] == batching


@pytest.mark.parametrize(("num_lines", "is_said"), [(0, False), (3, True), (6, False)])
def test_rounding_is_spoken_of_where_old_lines_and_new_ones_meet(tmp_path, capsys, num_lines, is_said):
    opened(tmp_path).write(0, LINES[:num_lines])  # as an earlier version did, without the batch size
    PredictionsFile(tmp_path, {"weights": "model"}, num_rows=6, starts_afresh=False, batching={"batch_size": 4})
    said = capsys.readouterr().err
    assert ("were made with a batch size that is not known, and new ones are with batch_size 4" in said) is is_said
    assert "None" not in said


def test_a_fresh_start_replaces_them_and_says_so(tmp_path, capsys):
    opened(tmp_path).write(0, LINES)
    file = opened(tmp_path, "other", starts_afresh=True)
    assert "written anew" in capsys.readouterr().err
    assert file.num_lines == 0
    assert json.loads((tmp_path / MADE_OF).read_text())["weights"] == "other"
