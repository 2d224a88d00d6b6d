"""A whole run in this process: the files it leaves, resume, and who may use a folder."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llamafactory.extras.errors import ConfigError, LlamaFactoryError
from llamafactory.train import loop
from llamafactory.train.tuner import run_exp


def losses(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_the_compatible_files(train_config):
    cfg = train_config(val_size=0.2, eval_strategy="epoch", plot_loss=True, save_steps=4, run_name="first run")
    result = run_exp(cfg)
    folder = result.output_dir
    assert result.exit_code == 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "trainer_log.jsonl", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
        "training_loss.png", "training_eval_loss.png", "run.json", "checkpoint-4", "checkpoint-8",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    training = next(row for row in rows if "loss" in row)
    assert training.keys() >= {
        "current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time",
        "throughput", "total_tokens",
    }  # fmt: skip
    assert [row["current_steps"] for row in rows if "eval_loss" in row] == [4, 8]
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(result.metrics["eval_loss"])
    assert results["train_loss"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["config"]["learning_rate"] == 1e-2
    assert record["plan"]["layout"] == "flat"
    assert record["packages"]["torch"]
    assert "fingerprint" in json.dumps(record["data"])
    card = (folder / "README.md").read_text()
    assert "# first run" in card
    assert "library_name: peft" in card


def test_training_lowers_the_loss(train_config):
    result = run_exp(train_config(finetuning_type="full", num_train_epochs=5, lr_scheduler_type="constant"))
    found = [float.fromhex(loss) for loss in losses(result.output_dir)]
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "cutoff_len": 64}, {"gradient_accumulation_steps": 2, "lora_dropout": 0.3}]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(train_config, tmp_path, monkeypatch, changes):
    changes = {"save_steps": 1, "num_train_epochs": 4, **changes}
    whole = run_exp(train_config(**changes, output_dir=str(tmp_path / "whole"))).output_dir
    cfg = train_config(**changes, output_dir=str(tmp_path / "parts"))
    original, calls = loop._Run.train_step, []

    def failing(run):
        calls.append(run.step)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        original(run)

    monkeypatch.setattr(loop._Run, "train_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run_exp(cfg)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    parts = run_exp(cfg).output_dir
    assert losses(parts) == losses(whole)
    assert weights(parts) == weights(whole)


def test_full_fine_tuning_saves_a_model_and_resumes(train_config, monkeypatch, tmp_path):
    changes = {"finetuning_type": "full", "save_steps": 2, "max_steps": 4}
    whole = run_exp(train_config(**changes, output_dir=str(tmp_path / "whole"))).output_dir
    cfg = train_config(**changes, output_dir=str(tmp_path / "parts"))
    original = loop._Run.train_step

    def failing(run):
        if run.step == 3:
            raise RuntimeError("power cut")
        original(run)

    monkeypatch.setattr(loop._Run, "train_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run_exp(cfg)
    monkeypatch.undo()
    parts = run_exp(cfg).output_dir
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert losses(parts) == losses(whole)


def test_ctrl_c_saves_and_says_so(train_config, monkeypatch):
    cfg = train_config(save_strategy="no")
    original = loop._Run.train_step

    def interrupted(run):
        original(run)
        if run.step == 3:
            threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            time.sleep(0.2)

    monkeypatch.setattr(loop._Run, "train_step", interrupted)
    result = run_exp(cfg)
    assert result.exit_code == 130
    assert result.summary.startswith("stopped by SIGINT after step 3 of 10, saved in")
    assert (cfg.train.output_dir and Path(cfg.train.output_dir) / "checkpoint-3" / "MANIFEST.json").is_file()
    assert json.loads((result.output_dir / "run.json").read_text())["state"] == "interrupted"
    monkeypatch.undo()
    continued = run_exp(cfg.__class__(**{**vars(cfg), "train": cfg.train.model_copy(update={"logging_steps": 500})}))
    assert continued.exit_code == 0


def test_a_finished_run_is_not_trained_again_unless_asked(train_config):
    cfg = train_config(max_steps=1)
    run_exp(cfg)
    before = weights(Path(cfg.train.output_dir))
    with pytest.raises(ConfigError, match="holds this run already, finished"):
        run_exp(cfg)
    assert weights(Path(cfg.train.output_dir)) == before
    assert run_exp(train_config(max_steps=1, overwrite_output_dir=True)).exit_code == 0


def test_another_configuration_may_not_use_the_folder(train_config):
    run_exp(train_config(max_steps=1))
    with pytest.raises(
        ConfigError, match=r"another configuration: learning_rate 0\.01 -> 0\.02.*\n.*\n.*overwrite_output_dir"
    ):
        run_exp(train_config(max_steps=1, learning_rate=2e-2))


def test_a_folder_with_a_foreign_model_is_not_touched(train_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds files of another run \(adapter_config.json\)"):
        run_exp(train_config(max_steps=1))
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "{}"


def test_overwriting_keeps_what_no_run_wrote(train_config, tmp_path):
    run_exp(train_config(max_steps=2, save_steps=1))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run_exp(train_config(max_steps=1, overwrite_output_dir=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]


def test_only_damaged_checkpoints_stop_the_resume(train_config, tmp_path, monkeypatch):
    cfg = train_config(save_steps=1, max_steps=3)
    original = loop._Run.train_step

    def failing(run):
        if run.step == 2:
            raise RuntimeError("power cut")
        original(run)

    monkeypatch.setattr(loop._Run, "train_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run_exp(cfg)
    monkeypatch.undo()
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        target = checkpoint / "adapter_model.safetensors"
        target.write_bytes(target.read_bytes()[:-1] + b"\x00")
    with pytest.raises(LlamaFactoryError, match="none of 2 checkpoints is intact"):
        run_exp(cfg)


def test_a_path_with_spaces_and_umlauts_works(train_config, tmp_path):
    folder = tmp_path / "mein erster Läuf 你好"
    assert run_exp(train_config(max_steps=1, output_dir=str(folder))).output_dir == folder
    assert (folder / "adapter_model.safetensors").is_file()


def test_evaluation_alone_writes_its_results_and_nothing_else(train_config, tmp_path):
    result = run_exp(train_config(do_train=False, do_eval=True, dataset="", eval_dataset="rows"))
    assert result.metrics["eval_loss"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval_results.json", "all_results.json"}


def test_the_batch_size_does_not_change_the_first_loss(train_config, tmp_path):
    first = []
    for index, (size, accumulation) in enumerate([(8, 1), (4, 2), (1, 8)]):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        first.append(losses(run_exp(train_config(**changes, output_dir=str(tmp_path / str(index)))).output_dir))
    for found in first[1:]:
        assert [float.fromhex(x) for x in found] == pytest.approx([float.fromhex(x) for x in first[0]], rel=1e-5)
