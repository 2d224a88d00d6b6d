"""Two processes: one that stops ends both, with its name; checkpoints of two continue as one, and back."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from tests.faults.cells import CELLS
from tests.faults.harness import ROOT, Place, rows_of
from tests.faults.ranks import begin, finish, stop_at

from llamafactory.launcher import torchrun_command
from llamafactory.train.checkpoint.manifest import find_fault

pytestmark = pytest.mark.long


def start(place: Place, name: str, ranks: int, *more: str, fault: str = "") -> subprocess.Popen[str]:
    """The real command, through torchrun where there are several ranks."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "LLAMAFACTORY_FAILPOINT": fault,
    }  # fmt: skip
    if ranks > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks)}
    words = [*place.words, f"output_dir={place.folder / name}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "llamafactory", "train", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines[-30:]))


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def test_one_stopped_rank_ends_both_and_is_named(make_place):
    place = make_place(num_train_epochs="2000", save_steps="100000")
    process = start(place, "stopped", 2)
    try:
        read_until(process, "step 20/")
        ranks = ranks_of(process)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        _, text = process.communicate(timeout=90)
        seconds = time.monotonic() - started
    finally:
        for child in ranks_of(process).values() if process.poll() is None else ():
            child.kill()
        process.kill()
    assert process.returncode not in (0, 130, 143)
    who = rf"rank 1 \(pid {ranks[1].pid} on .*\)"
    assert re.search(who + r" has given no sign of life for 20 s; it was at \w+\.py:\d+ in \w+", text)
    assert re.search(r"Rank 0 was at .*, in step \d+, rows: rows\.json#\d+ \(\d+ tokens\), rows\.json#", text)
    assert seconds < 60
    record = json.loads((place.folder / "stopped" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "rank 1" in record["error"]
    assert not any(child.is_running() for child in ranks.values())


def run(place: Place, name: str, ranks: int, *more: str, fault: str = "", code: int = 0) -> str:
    process = start(place, name, ranks, *more, fault=fault)
    _, text = process.communicate(timeout=300)
    assert (process.returncode == 0) == (code == 0), text[-4000:]
    return text


def test_a_signal_at_one_rank_ends_a_long_step_of_both(make_place):
    """A step has eight micro-batches of a second; both leave it between two of them, and it is done anew later."""
    place = make_place(
        per_device_train_batch_size="1", gradient_accumulation_steps="8", num_train_epochs="2", lora_dropout="0.3",
        val_size="2", eval_strategy="steps", eval_steps="1", num_rows=18,
    )  # fmt: skip
    run(place, "whole", 2)
    process = start(place, "signalled", 2, fault="micro:*:sleep=1")
    try:
        read_until(process, "step 1/")
        os.kill(ranks_of(process)[1].pid, signal.SIGTERM)
        _, text = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, text[-3000:]
    last = text.rstrip().splitlines()[-1]
    assert "stopped by SIGTERM after step 1 of 2, saved in" in last, text[-3000:]
    assert find_fault(place.folder / "signalled" / "checkpoint-1") is None
    run(place, "signalled", 2)
    assert losses_of(place.folder / "signalled") == losses_of(place.folder / "whole")


def test_a_signal_ends_the_sampling_of_both_ranks(make_place):
    place = make_place(**CELLS["grpo lora"], per_device_train_batch_size="1")
    process = start(place, "sampling", 2, fault="sample:*:sleep=0.5")
    try:
        read_until(process, "failpoint sample:*:sleep=0.5")
        os.kill(ranks_of(process)[0].pid, signal.SIGTERM)
        _, text = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, text[-3000:]
    assert "stopped by SIGTERM after step 0 of " in text


def test_a_second_ctrl_c_stops_at_once(make_place):
    """As a terminal sends it, to the whole group; the first one is in the middle of its save."""
    place = make_place(num_train_epochs="2000", save_steps="100000")
    process = start(place, "twice", 2, fault="save.file:1:sleep=60")
    try:
        read_until(process, "step 3/")
        ranks = ranks_of(process)
        os.killpg(process.pid, signal.SIGINT)
        read_until(process, "failpoint save.file:1")
        time.sleep(2.5)
        os.killpg(process.pid, signal.SIGINT)
        _, text = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, text[-3000:]
    assert text.rstrip().splitlines()[-1].startswith("stopped at once by a second "), text[-3000:]
    assert not any(child.is_running() for child in ranks.values())


def test_processes_whose_torchrun_is_killed_save_and_stop(make_place):
    place = make_place(num_train_epochs="2000", save_steps="100000")
    process = start(place, "orphans", 2)
    try:
        read_until(process, "step 3/")
        ranks = ranks_of(process)
        psutil.Process(process.pid).children()[0].kill()
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, text[-3000:]
    assert re.search(r"stopped by SIGTERM after step \d+ of \d+, saved in ", text.rstrip().splitlines()[-1])
    assert not psutil.wait_procs(list(ranks.values()), timeout=30)[1]
    assert find_fault(place.folder / "orphans" / "last") is None


def test_data_that_cannot_be_used_end_several_processes_with_3(make_place):
    place = make_place()
    (place.folder / "rows.json").write_text("{")
    process = start(place, "broken", 2)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 3, text[-3000:]
    assert "rows.json" in text[text.rindex("error: ") :]


FAILING = """
import os
from pathlib import Path

calls = []

def evenness(completions):
    calls.append(completions)
    if os.environ["RANK"] == "1" and len(calls) > 2 and Path(__file__).with_name("broken").exists():
        raise ConnectionError("the grader is gone")
    return [sum(ord(letter) % 2 == 0 for letter in text) / (1 + len(text)) for text in completions]
"""


def test_a_reward_function_that_fails_in_one_rank_ends_both_behind_a_save(make_place):
    place = make_place(**CELLS["grpo lora"], per_device_train_batch_size="1", save_steps="50")
    (place.folder / "rewards.py").write_text(FAILING)
    run(place, "whole", 2)
    (place.folder / "broken").touch()
    text = run(place, "failed", 2, code=1)
    assert "rank 1: reward function evenness: ConnectionError: the grader is gone" in text
    record = json.loads((place.folder / "failed" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "the grader is gone" in record["error"]
    assert find_fault(place.folder / "failed" / "checkpoint-2") is None
    (place.folder / "broken").unlink()
    run(place, "failed", 2)
    assert losses_of(place.folder / "failed") == losses_of(place.folder / "whole")
    weights = [(place.folder / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "failed")]
    assert weights[0] == weights[1]


def test_a_step_that_is_not_finite_ends_both_ranks_behind_the_save(make_place):
    """The first process saves for a while; `begin` ends it, as torchrun would, where the other one fails before."""
    place = make_place(per_device_train_batch_size="1", save_steps="100")
    ranks = begin(place, "out", 2, fault="step:4:nan,save.file:*:sleep=0.6", fault_rank=None)
    assert ranks.wait() == [1, 1], ranks.text[-4000:]
    assert find_fault(place.folder / "out" / "checkpoint-3") is None
    error = json.loads((place.folder / "out" / "run.json").read_text())["error"]
    assert "step 4 is not finite" in error
    assert "rows.json#" in error


def test_ranks_that_would_not_do_the_same_are_refused(make_place):
    place, other = make_place(per_device_train_batch_size="1"), make_place(folder="other", num_rows=13)
    for own, words in (
        (
            ["learning_rate=1e-3", f"cache_dir={place.folder / 'cache'}"],
            "learning_rate: 0.01 in rank 0, 0.001 in rank 1",
        ),
        ([f"dataset_dir={other.folder}"], "rows of rows"),
    ):
        ranks = begin(place, "out", 2, own={1: own})
        assert ranks.wait() == [2, 2], ranks.text[-4000:]
        assert all(words in run.text for run in ranks.runs), ranks.text[-4000:]
        assert not (place.folder / "out" / "trainer_log.jsonl").exists()


def test_a_rank_without_the_checkpoint_is_refused(make_place):
    """Two machines without a shared disk: the second one would begin anew, with other rows."""
    place = make_place(per_device_train_batch_size="1", async_save="false")
    own = {1: [f"output_dir={place.folder / 'elsewhere'}"]}
    assert begin(place, "out", 2, own=own, fault="step:3:kill").wait()[0] == -9
    ranks = begin(place, "out", 2, own=own)
    assert ranks.wait() == [2, 2], ranks.text[-4000:]
    assert "begins with: checkpoint-2 in rank 0, nothing in rank 1" in ranks.text
    assert find_fault(place.folder / "out" / "checkpoint-2") is None


def test_a_signal_while_one_rank_tokenises_and_one_waits(make_place):
    place = make_place(overwrite_cache="true")
    process = start(place, "tokenising", 2, fault="data:1:sleep=60")
    try:
        read_until(process, "failpoint data:1")
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 143, text[-3000:]
    assert text.rstrip().splitlines()[-1].startswith("stopped by SIGTERM before the first step")
    assert not list((place.folder / "tokenising").glob("checkpoint-*"))


@pytest.mark.parametrize(("ranks", "later"), [(2, 2), (1, 2), (2, 1)])
def test_a_rollout_in_a_checkpoint_is_that_of_all_ranks(make_place, ranks, later):
    """Killed between the two passes over a rollout, of which each process has sampled a part."""
    place = make_place(**CELLS["grpo lora, two passes over each rollout"], async_save="false")
    size = [f"per_device_train_batch_size={2 // count}" for count in (ranks, later)]
    whole = finish(place, "whole", ranks, size[0])
    stop_at(place, "killed", ranks, 4, size[0])
    done = begin(place, "killed", later, size[1])
    assert not any(done.wait()), done.text[-4000:]
    assert "continuing checkpoint-3" in done.text
    assert "it is played again" not in done.text
    killed = place.outcome("killed")
    assert killed.rows == whole.rows
    if ranks == later:
        assert (killed.losses, killed.weights) == (whole.losses, whole.weights)
    else:
        assert losses_of(place.folder / "killed")[:4] == pytest.approx(losses_of(place.folder / "whole")[:4], rel=1e-3)


TWICE = """
import sys
from llamafactory.python_api import run_exp

words = dict(word.split("=", 1) for word in sys.argv[1:])
for name in ("one", "two"):
    assert run_exp({**words, "output_dir": words["output_dir"] + "/" + name}).exit_code == 0
"""


def test_two_runs_in_the_same_processes(make_place):
    place = make_place(max_steps="2", per_device_train_batch_size="1")
    (place.folder / "twice.py").write_text(TWICE)
    command = torchrun_command([*place.words, f"output_dir={place.folder}"], {}, 2, child_module="twice")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{place.folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses_of(place.folder / "one") == losses_of(place.folder / "two")


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_continue_as_one_and_one_as_two(make_place):
    """Order and losses are those of one process; the last digits are not promised across numbers of processes."""
    place = make_place(save_steps="1", num_train_epochs="2")
    reference = place.finish("reference")
    one, two = ("per_device_train_batch_size=2",), ("per_device_train_batch_size=1",)
    run(place, "ranks", 2, *two, fault="step:4:kill", code=1)
    run(place, "ranks", 1, *one, fault="step:4:kill", code=1)
    text = run(place, "ranks", 2, *two)
    assert "every step holds the rows that it would have held" in text
    assert losses_of(place.folder / "ranks") == pytest.approx(losses_of(place.folder / "reference"), rel=1e-4)
    ours, theirs = (load_file(place.folder / name / "adapter_model.safetensors") for name in ("ranks", "reference"))
    for key, weight in theirs.items():
        assert (ours[key] - weight).abs().max() <= 1e-3 * weight.abs().max() + 1e-5
    assert len(reference.rows) == len(losses_of(place.folder / "ranks"))


def test_two_ranks_continue_bit_equal(make_place):
    place = make_place(
        folder="a b/ü", save_steps="1", num_train_epochs="2", lora_dropout="0.3", per_device_train_batch_size="1"
    )
    run(place, "whole", 2)
    run(place, "killed", 2, fault="step:5:kill", code=1)
    run(place, "killed", 2)
    assert losses_of(place.folder / "killed") == losses_of(place.folder / "whole")
    weights = [(place.folder / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    states = load_file(place.folder / "whole" / "last" / "rng_state.safetensors")
    assert {name.split(".")[0] for name in states} == {"0", "1"}


@pytest.mark.parametrize(
    "cell", ["sft full, streamed from two sources, packed", "grpo lora, two passes over each rollout"]
)
def test_ranks_killed_at_random_go_on_bit_equal(make_place, tally, cell):
    """One of two is killed, at any moment and either one; the other ends by itself."""
    place = make_place(**{**CELLS[cell], "per_device_train_batch_size": "1"})
    finish(place, "warm", 2)
    started = time.monotonic()
    whole = finish(place, "whole", 2)
    span, rng, kills = time.monotonic() - started, random.Random(7), 0
    while kills < 4 and not (kills and place.is_finished("killed")):
        ranks = begin(place, "killed", 2)
        time.sleep(rng.uniform(0.1, 0.9) * span)
        kills += ranks.runs[rng.randrange(2)].kill()
        ranks.wait()
        assert kills or not place.is_finished("killed"), "the run was over before the first kill"
    killed = place.outcome("killed") if place.is_finished("killed") else finish(place, "killed", 2)
    equal = (killed.losses, killed.weights) == (whole.losses, whole.weights)
    begun, _ = rows_of(place.folder / "killed.trace")
    lost = sum(rows != whole.rows.get(step) for step, rows in begun)
    tally.add(f"{cell}, two processes", kills=kills, lost=lost, equal=equal)
    assert (equal, lost) == (True, 0)
