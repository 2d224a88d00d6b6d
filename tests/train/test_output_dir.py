"""Who may use a folder, and what a resume must match."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llamafactory.extras.errors import ConfigError, LlamaFactoryError
from llamafactory.train import loop
from llamafactory.train.checkpoint.manifest import seal
from llamafactory.train.output_dir import claim_output_dir, clear_replaced_run
from llamafactory.train.tuner import run_exp


@pytest.fixture
def stopped(train_config, monkeypatch):
    """Makes an unfinished run with checkpoints after steps 1 and 2; returns its config."""

    def make(**changes):
        cfg = train_config(save_steps=1, max_steps=4, **changes)
        original = loop._Run.train_step

        def failing(run):
            if run.step == 2:
                raise RuntimeError("power cut")
            original(run)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Run, "train_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                run_exp(cfg)
        return cfg

    return make


def test_a_named_checkpoint_is_verified(stopped, train_config, tmp_path):
    stopped()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    target = checkpoint / "optimizer.safetensors"
    target.write_bytes(target.read_bytes()[:-40] + bytes(40))
    with pytest.raises(LlamaFactoryError, match=r"checkpoint-2 is not used: optimizer.safetensors is damaged"):
        run_exp(train_config(save_steps=1, max_steps=4, resume_from_checkpoint=str(checkpoint)))


def test_a_named_checkpoint_of_another_configuration_is_refused(stopped, train_config, tmp_path):
    stopped()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ConfigError, match=r"another configuration: learning_rate 0\.01 -> 0\.5; lora_rank 8 -> 64"):
        run_exp(train_config(max_steps=4, resume_from_checkpoint=checkpoint, learning_rate=0.5, lora_rank=64))


def test_a_named_checkpoint_is_continued(stopped, train_config, tmp_path):
    stopped()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    result = run_exp(train_config(save_steps=1, max_steps=4, resume_from_checkpoint=checkpoint))
    rows = [json.loads(line) for line in (result.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert [row["current_steps"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_resume_wins_over_overwrite_where_it_is_asked_for(stopped, train_config):
    stopped(overwrite_output_dir=True)
    result = run_exp(train_config(save_steps=1, max_steps=4, overwrite_output_dir=True, resume_from_checkpoint=True))
    assert result.exit_code == 0
    record = json.loads((result.output_dir / "run.json").read_text())
    manifest = json.loads((result.output_dir / "checkpoint-1" / "MANIFEST.json").read_text())
    assert record["run_id"] == manifest["run_id"]


def test_other_rows_are_refused(stopped, train_config, tmp_path):
    cfg = stopped()
    rows = tmp_path / "data" / "rows.json"
    rows.write_text(rows.read_text().replace("number 3", "number three"))
    with pytest.raises(ConfigError, match="was started with other rows"):
        run_exp(cfg)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_run_goes_on_with_its_own_day_and_tokenizer(stopped, train_config, tmp_path):
    cfg = stopped()
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"text": record["text"] | {"tokenizer": "another"}, "day": "2024-02-29"}))
    with pytest.raises(ConfigError, match="holds a run that began with another tokenizer, whose content has changed"):
        run_exp(cfg)
    run_exp(train_config(save_steps=1, max_steps=4, allow_change=["tokenizer"]))
    now = json.loads(path.read_text())
    assert (now["text"], now["day"]) == (record["text"], "2024-02-29")


def test_another_number_of_processes_is_refused(stopped, tmp_path):
    cfg = stopped()
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_processes": 3}))
    with pytest.raises(
        ConfigError,
        match=r"12 rows a step \(3 processes x 4 rows x 1 accumulated\), and this one has 4 ",
    ):
        run_exp(cfg)


def test_resuming_nothing_is_an_error(train_config):
    with pytest.raises(ConfigError, match=r"no run\.json, so there is no run to resume"):
        run_exp(train_config(resume_from_checkpoint=True))


def test_a_lora_run_replaces_every_file_of_a_full_run(train_config, tmp_path):
    folder = tmp_path / "out"
    run_exp(train_config(finetuning_type="full", max_steps=1, plot_loss=True))
    assert (folder / "model.safetensors").is_file()
    run_exp(train_config(max_steps=1, overwrite_output_dir=True))
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists()
    assert (folder / "adapter_model.safetensors").is_file()


def change_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: tensor * 1.001 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_that_was_changed_is_refused_where_it_is_needed(
    stopped, train_config, tmp_path, tiny_model_dir, method, capsys
):
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    options = {"model_name_or_path": str(model), "finetuning_type": method}
    stopped(**options)
    change_weights(model)
    options |= {"save_steps": 1, "max_steps": 4}
    if method == "full":  # the whole model is in the checkpoint
        assert run_exp(train_config(**options)).exit_code == 0
        return
    with pytest.raises(ConfigError, match=r"began with other weights: those of .*model, or of an adapter"):
        run_exp(train_config(**options))
    assert run_exp(train_config(**options, allow_change="model_name_or_path")).exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["state"] == "finished"
    capsys.readouterr()
    again = {**options, "output_dir": str(tmp_path / "again"), "rerun_of": str(tmp_path / "out" / "run.json")}
    change_weights(model)
    with pytest.raises(ConfigError, match="are not those of the recorded run"):
        run_exp(train_config(**again))


def test_lost_rows_are_listed_also_in_a_replaced_folder(train_config, tmp_path):
    run_exp(train_config(max_steps=1))
    cfg = train_config(max_steps=1, overwrite_output_dir=True, overlong="drop", cutoff_len=30)
    run_exp(cfg)
    assert (tmp_path / "out" / "bad_rows.jsonl").read_text().count("longer than cutoff_len") > 0


def test_a_run_that_cannot_start_is_recorded_as_failed(train_config, tmp_path, monkeypatch):
    from llamafactory.train import build

    def broken(*args, **options):
        raise RuntimeError("no such optimizer")

    monkeypatch.setattr(build, "build_optimizer", broken)
    with pytest.raises(RuntimeError, match="no such optimizer"):
        run_exp(train_config(max_steps=1))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "failed"


def test_two_runs_of_different_precision_in_one_process(train_config, tmp_path):
    for name, changes in {"a": {}, "b": {"bf16": True}, "c": {"pure_bf16": True}}.items():
        result = run_exp(train_config(max_steps=1, output_dir=str(tmp_path / name), **changes))
        assert result.metrics["train_loss"] > 0


def test_packing_without_training_rows(train_config):
    cfg = train_config(do_train=False, do_eval=True, dataset="", eval_dataset="rows", packing=True)
    assert run_exp(cfg).metrics["eval_loss"] > 0


def test_weights_only_checkpoints_say_that_they_end_here(train_config, monkeypatch):
    import os
    import signal

    original = loop._Run.train_step

    def interrupted(run):
        original(run)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "train_step", interrupted)
    result = run_exp(train_config(save_only_model=True))
    assert result.summary.endswith(f"{Path('out', 'checkpoint-1')}; weights only, so it cannot be continued")


@pytest.fixture
def write_run(train_config):
    """Writes a folder as a run of the usual configuration leaves it; returns the folder."""

    def write(folder, *, run_id="a", steps=(2, 4), state="running", **changes):
        cfg = train_config(**changes)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"format": 1, "run_id": run_id, "state": state, "config": cfg.flat(), "given": cfg.given_keys()}
        (folder / "run.json").write_text(json.dumps(record))
        for step in steps:
            write_checkpoint(folder / f"checkpoint-{step}", run_id)
        return folder

    return write


def write_checkpoint(folder, run_id):
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    seal(folder, {"run_id": run_id})


def test_a_checkpoint_that_was_copied_into_a_young_run_is_not_removed(write_run, train_config, tmp_path):
    folder = write_run(tmp_path / "out", steps=())
    write_checkpoint(folder / "checkpoint-500", "b")
    with pytest.raises(
        ConfigError, match=r"no checkpoint of this run, but of another one \(checkpoint-500\)"
    ) as caught:
        claim_output_dir(train_config())
    assert f"resume_from_checkpoint={folder / 'checkpoint-500'}" in str(caught.value)
    claim = claim_output_dir(train_config(resume_from_checkpoint=str(folder / "checkpoint-500")))
    assert (claim.run_id, claim.resume_from) == ("a", folder / "checkpoint-500")
    assert not claim.replaces


def test_a_replaced_run_takes_only_its_own_checkpoints_with_it(write_run, train_config, tmp_path, capsys):
    folder = write_run(tmp_path / "out")
    write_checkpoint(folder / "checkpoint-500", "b")
    claim = claim_output_dir(train_config(overwrite_output_dir=True))
    said = capsys.readouterr().err
    assert "holds an unfinished run up to checkpoint-500: overwrite_output_dir starts anew, and removes it" in said
    clear_replaced_run(claim)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-500"]


def test_a_checkpoint_from_elsewhere_does_not_overwrite_a_run(write_run, train_config, tmp_path):
    write_run(tmp_path / "out", run_id="a", state="finished")
    source = str(write_run(tmp_path / "source", run_id="b") / "checkpoint-4")
    with pytest.raises(ConfigError, match="holds another run than that of"):
        claim_output_dir(train_config(resume_from_checkpoint=source))
    claim = claim_output_dir(train_config(resume_from_checkpoint=source, overwrite_output_dir=True))
    assert claim.replaces
    other = str(tmp_path / "new")
    claim = claim_output_dir(train_config(resume_from_checkpoint=source, output_dir=other))
    assert (claim.run_id, claim.replaces, claim.record is None) == ("b", False, False)
    write_run(tmp_path / "new", run_id="b", steps=(5,))  # that run, killed: the same command goes on
    claim = claim_output_dir(train_config(resume_from_checkpoint=source, output_dir=other))
    assert (claim.resume_from, claim.replaces) == (Path(source), False)
    write_run(tmp_path / "new", run_id="b", steps=(), state="finished")
    with pytest.raises(ConfigError, match="holds this run already, finished"):
        claim_output_dir(train_config(resume_from_checkpoint=source, output_dir=other))


def test_a_checkpoint_whose_folder_has_no_record_says_where_that_belongs(write_run, train_config, tmp_path):
    folder = write_run(tmp_path / "source")
    (folder / "run.json").unlink()
    with pytest.raises(ConfigError, match="it lies beside checkpoint-4 where that was written") as caught:
        claim_output_dir(train_config(resume_from_checkpoint=str(folder / "checkpoint-4")))
    assert str(folder) in str(caught.value)


def test_weights_of_another_program_can_begin_a_new_run(train_config, tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(LlamaFactoryError, match=f"begin a new run: adapter_name_or_path: {folder}"):
        claim_output_dir(train_config(resume_from_checkpoint=str(folder)))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', "{}", '{"run_id": 3}', '{"run_id": "a", "config": []}', "[" * 9999]
)
def test_a_damaged_record_is_one_clear_error_and_may_be_overwritten(write_run, train_config, tmp_path, content):
    folder = write_run(tmp_path / "out")
    (folder / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"its run\.json is damaged"):
        claim_output_dir(train_config())
    claim = claim_output_dir(train_config(overwrite_output_dir=True))
    assert claim.replaces
    assert claim.run_id != "a"


def test_a_record_of_another_format_is_refused(write_run, train_config, tmp_path):
    folder = write_run(tmp_path / "out")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ConfigError, match=r"its run\.json has format 2, and this version reads 1"):
        claim_output_dir(train_config())


def test_a_finished_run_goes_on_where_that_is_asked_for(write_run, train_config, tmp_path):
    folder = write_run(tmp_path / "out", state="finished", max_steps=4)
    with pytest.raises(ConfigError, match="holds this run already, finished") as caught:
        claim_output_dir(train_config(max_steps=4))
    assert "for more steps: resume_from_checkpoint=true" in str(caught.value)
    with pytest.raises(ConfigError, match="max_steps 4 -> 8") as caught:
        claim_output_dir(train_config(max_steps=8))
    assert "resume with them: resume_from_checkpoint=true --allow-change max_steps" in str(caught.value)
    claim = claim_output_dir(train_config(max_steps=8, resume_from_checkpoint=True, allow_change=["max_steps"]))
    assert (claim.resume_from, claim.times_continued) == (folder / "checkpoint-4", 1)


def test_no_checkpoint_named_is_not_the_folder_that_one_stands_in(write_run, train_config, tmp_path):
    folder = write_run(tmp_path / "out")
    assert claim_output_dir(train_config(resume_from_checkpoint="")).resume_from == folder / "checkpoint-4"


def test_inputs_in_the_folder_that_is_emptied_are_refused(write_run, train_config, tmp_path):
    adapter = write_run(tmp_path / "out") / "checkpoint-4"
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_name_or_path .*which overwrite_output_dir empties"):
        train_config(adapter_name_or_path=str(adapter), overwrite_output_dir=True)
