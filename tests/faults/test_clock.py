"""The time of day jumps by a day while a run is under way: no number, no lock and no kept row depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.faults.cells import CELLS
from tests.faults.harness import PATIENCE, Place

DAY = 86_400.0


def seconds_of(text: str) -> float:
    """Of `1:02:03`; a day or a sign in front of it is an error."""
    hours, minutes, seconds = map(float, text.split(":"))
    return hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_jump_of_the_clock_changes_no_number(make_place, jump: float) -> None:
    place: Place = make_place(**CELLS["sft lora evaluated, best kept"], max_steps="6")
    reference = place.finish("reference")
    run = place.begin("out", clock=[jump, 3])
    assert run.wait() == 0, run.text[-3000:]
    assert f"the clock jumps by {jump} s" in run.text
    assert place.outcome("out") == reference
    folder = place.folder / "out"
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    times = [seconds_of(row[key]) for row in rows for key in ("elapsed_time", "remaining_time") if key in row]
    results = json.loads((folder / "all_results.json").read_text())
    times += [value for key, value in results.items() if key.endswith("_runtime")]
    assert len(times) > 6
    assert all(0 <= seconds < PATIENCE for seconds in times), times
    rates = [value for key, value in results.items() if "per_second" in key]
    assert rates
    assert min(rates) > 1 / PATIENCE


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_jump_of_the_clock_steals_no_lock_and_no_rows(make_place, jump: float) -> None:
    place: Place = make_place(max_steps="8")
    tokens = place.folder / "tokens"
    env = {"LLAMAFACTORY_TOKEN_CACHE": str(tokens)}
    reference = place.finish("reference")
    run = place.begin("out", fault="step:4:sleep=2", env=env)
    run.reach_fault()
    other = place.begin("out", env=env, clock=[jump, 0])
    prune = place.zygote.start(
        ["data", "cache", "prune", "--unused-days", "0.5", "--folder", str(tokens)], place.folder / "prune.log",
        clock=[jump, 0],
    )  # fmt: skip
    assert other.wait() == 2
    assert "another run is using this folder" in other.text
    assert prune.wait() == 0, prune.text
    assert f"{int(jump > 0)} of 1 data sets" in prune.text
    assert run.wait() == 0, run.text[-3000:]
    assert place.outcome("out") == reference


TEMPLATE = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_run_that_goes_on_tomorrow_writes_the_day_on_which_it_began(make_place, faults_model, tmp_path) -> None:
    model = shutil.copytree(faults_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    place: Place = make_place(template="auto", model_name_or_path=str(model), cutoff_len="128", max_steps="8")
    run_of_today = place.finish("reference")
    assert place.begin("out", fault="step:5:kill", env=tokens_in(tmp_path, "one")).wait() == -9
    run = place.begin("out", clock=[DAY, 0], env=tokens_in(tmp_path, "two"))
    assert run.wait() == 0, run.text[-3000:]
    assert place.outcome("out") == run_of_today
    again = place.zygote.start(
        ["train", "--rerun", str(place.folder / "out" / "run.json")], place.folder / "again.log", clock=[DAY, 0],
        trace=place.folder / "out-rerun.trace", env=tokens_in(tmp_path, "three"),
    )  # fmt: skip
    assert again.wait() == 0, again.text[-3000:]
    assert place.outcome("out-rerun") == run_of_today
    tomorrow = place.begin("tomorrow", clock=[DAY, 0])
    assert tomorrow.wait() == 0, tomorrow.text[-3000:]
    assert place.outcome("tomorrow").losses != run_of_today.losses


def tokens_in(folder: Path, name: str) -> dict[str, str]:
    """Rows are tokenised anew."""
    return {"LLAMAFACTORY_TOKEN_CACHE": str(folder / name)}
