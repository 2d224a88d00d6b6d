"""Predictions of a run: the same answers as transformers one by one, the compatible files, kills and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamafactory.data.table import ShardBuilder, table_of
from llamafactory.data.types import Example
from llamafactory.extras.errors import ConfigError, DataError
from llamafactory.train.predict import weights_digest
from llamafactory.train.predict_parts import _require_same_split
from llamafactory.train.predictions_file import NAME
from llamafactory.train.text_scores import mean_scores
from llamafactory.train.tuner import run_exp

PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 12, "do_sample": False,
           "per_device_eval_batch_size": 3}  # fmt: skip


def lines_of(folder):
    return [json.loads(line) for line in (folder / NAME).read_text(encoding="utf-8").split("\n") if line]


def greedy(model_dir, prompts, max_new_tokens):
    """One prompt after the other, with transformers' own `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            made = model.generate(**ids, do_sample=False, max_new_tokens=max_new_tokens)
        texts.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_predictions_are_what_generate_gives_and_the_files_are_the_compatible_ones(train_config, tiny_model_dir):
    result = run_exp(train_config(do_train=False, dataset=(), eval_dataset="rows", **PREDICT))
    lines = lines_of(result.output_dir)
    assert [list(line) for line in lines] == [["prompt", "predict", "label"]] * 20
    assert lines[3]["label"] == "word 3 " * 4
    assert lines[3]["prompt"] == ("<|im_start|>user\nRepeat the word number 3.<|im_end|>\n<|im_start|>assistant\n")
    assert [line["predict"] for line in lines] == greedy(tiny_model_dir, [line["prompt"] for line in lines], 12)
    found = json.loads((result.output_dir / "predict_results.json").read_text())
    scores = mean_scores((line["predict"], line["label"]) for line in lines)
    assert {name: found[f"predict_{name}"] for name in scores} == scores
    everything = json.loads((result.output_dir / "all_results.json").read_text())
    assert found.items() <= everything.items()
    assert found["predict_loss"] == everything["eval_loss"]
    assert everything["eval_rouge-l"] == found["predict_rouge-l"]
    assert found["predict_samples_per_second"] > 0


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(train_config, tmp_path):
    found = []
    for number, (seed, size) in enumerate([(1, 3), (1, 7), (2, 3)]):
        changes = PREDICT | {"do_sample": True, "per_device_eval_batch_size": size, "seed": seed}
        folder = str(tmp_path / f"run {number}")
        run_exp(train_config(do_train=False, dataset=(), eval_dataset="rows", output_dir=folder, **changes))
        found.append([line["predict"] for line in lines_of(tmp_path / f"run {number}")])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_training_ends_with_predictions_of_its_held_out_rows(train_config):
    cfg = train_config(val_size=0.2, eval_strategy="epoch", **PREDICT)
    result = run_exp(cfg)
    assert len(lines_of(result.output_dir)) == 4
    rows = [json.loads(line) for line in (result.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    curve = [row["eval_rouge-l"] for row in rows if "eval_rouge-l" in row]
    assert len(curve) == 2
    assert curve[-1] == result.metrics["predict_rouge-l"] == result.metrics["eval_rouge-l"]
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["state"] == "finished"


def test_generation_changes_no_step_of_the_training(train_config, tmp_path):
    weights = []
    for changes in ({}, {"predict_with_generate": True, "max_new_tokens": 4}):
        folder = tmp_path / f"{len(changes)}"
        options = {"val_size": 0.2, "eval_strategy": "epoch", "lora_dropout": 0.2, "max_steps": 5}
        run_exp(train_config(**options, **changes, output_dir=str(folder)))
        weights.append((folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_each_set_has_scores_of_its_own(train_config, tmp_path):
    train_config()  # writes the data
    data = tmp_path / "data"
    (data / "two.json").write_text(
        json.dumps([{"instruction": "Say hi.", "output": "hi"}, {"instruction": "Be.", "output": "no"}])
    )
    info = json.loads((data / "dataset_info.json").read_text()) | {"two": {"file_name": "two.json"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    result = run_exp(
        train_config(do_train=False, dataset=(), eval_dataset="rows,two", eval_on_each_dataset=True, **PREDICT)
    )
    assert {"predict_rows_rouge-1", "predict_two_bleu-4", "eval_two_rouge-2"} <= set(result.metrics)
    assert [line["label"] for line in lines_of(result.output_dir)[20:]] == ["hi", "no"]


def test_a_file_of_other_weights_is_not_continued(train_config, tmp_path, tiny_model_dir):
    options = {"do_train": False, "dataset": (), "eval_dataset": "rows", "finetuning_type": "full", **PREDICT}
    run_exp(train_config(**options))
    before = (tmp_path / "out" / NAME).read_bytes()
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other model"
    other.mkdir()
    for path in tiny_model_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="weights: "):
        run_exp(train_config(**options | {"model_name_or_path": str(other)}))
    assert (tmp_path / "out" / NAME).read_bytes() == before
    changed = {"model_name_or_path": str(other), "overwrite_output_dir": True}
    assert run_exp(train_config(**options | changed)).exit_code == 0


@pytest.mark.parametrize("change", ["rows", "elements", "name", "shape", "type", "sign of zero"])
def test_the_digest_of_weights_sees_a_permutation(change):
    weight = torch.arange(6.0).reshape(2, 3)
    holder = torch.nn.Module()
    holder.register_buffer("weight", weight)
    other = torch.nn.Module()
    changed = {
        "rows": weight[[1, 0]], "elements": weight[:, [1, 0, 2]], "name": weight, "shape": weight.reshape(3, 2),
        "type": weight.to(torch.float64), "sign of zero": torch.where(weight == 0, -0.0, weight),
    }  # fmt: skip
    other.register_buffer("bias" if change == "name" else "weight", changed[change])
    assert weights_digest(holder) != weights_digest(other)
    other.register_buffer("weight", weight.T.contiguous().T)  # other strides, the same numbers
    if change != "name":
        assert weights_digest(holder) == weights_digest(other)


def test_predictions_that_are_in_the_way_cost_no_report_of_the_training(train_config, tmp_path):
    cfg = train_config(val_size=0.2, **PREDICT)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / NAME).write_text("{}\n")
    with pytest.raises(ConfigError, match="holds generated_predictions.jsonl of another run"):
        run_exp(cfg)
    assert (tmp_path / "out" / NAME).read_text() == "{}\n"
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= set(results)
    assert (tmp_path / "out" / "README.md").is_file()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["state"], "another run" in record["error"]) == ("failed", True)


def test_rows_that_teach_nothing_would_move_the_split(train_config, tmp_path):
    train_config()
    rows = [
        {"conversations": [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "yes", "train": place != 5}]}
        for place in range(10)
    ]
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.json", "formatting": "sharegpt"}})
    )
    with pytest.raises(DataError, match=r"other rows for predictions[\s\S]*9 rows with something to learn, 10 with"):
        run_exp(train_config(val_size=0.3, max_steps=1, **PREDICT))


def test_as_many_rows_that_are_others_would_move_the_split_too():
    def prepared(*rows):
        builder = ShardBuilder()
        for row in rows:
            builder.add([Example(input_ids=np.ones(2, np.int32), labels=np.ones(2, np.int32))])
            builder.note_origin(f"rows.json#{row}")
        report = SimpleNamespace(datasets=[SimpleNamespace(name="rows", num_kept=len(rows))])
        return SimpleNamespace(evaluation={"eval": table_of([builder.build()])}, report=report)

    _require_same_split(prepared(1, 3), prepared(1, 3))
    with pytest.raises(DataError, match="but not the same ones"):
        _require_same_split(prepared(1, 3), prepared(1, 4))


RUN = """
import json, sys
from llamafactory.compose import load_config
from llamafactory.train.tuner import run_exp
sys.exit(run_exp(load_config(json.load(open(sys.argv[1])))).exit_code)
"""


def start(repo_dir, folder, options, **environment):
    (folder / "options.json").write_text(json.dumps(options))
    with (folder / "errors.txt").open("a") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder / "options.json")], stderr=errors, cwd=repo_dir,
            env=os.environ | {"PYTHONPATH": str(repo_dir / "src"), "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip


def options_of(train_config, **changes):
    cfg = train_config(**changes)
    given = set().union(*(section.model_fields_set for _, section in cfg.sections()))
    return {key: value for key, value in cfg.flat().items() if key in given}


@pytest.mark.long
@pytest.mark.parametrize("do_train", [False, True])
def test_a_killed_run_goes_on_and_ends_with_the_same_file(train_config, tmp_path, repo_dir, do_train):
    rows = {"dataset": "rows", "eval_dataset": "rows"} if do_train else {"dataset": (), "eval_dataset": "rows"}
    changes = {"do_train": do_train, "max_steps": 2, **rows, **PREDICT, "per_device_eval_batch_size": 1}
    whole = run_exp(train_config(**changes, output_dir=str(tmp_path / "whole"))).output_dir
    options = options_of(train_config, **changes, output_dir=str(tmp_path / "parts"))
    killed = start(repo_dir, tmp_path, options, LLAMAFACTORY_FAILPOINT="predict:3:kill")
    assert killed.wait(timeout=300) == -9, (tmp_path / "errors.txt").read_text()[-2000:]
    parts = tmp_path / "parts" / NAME
    assert len(lines_of(tmp_path / "parts")) == 8
    parts.write_bytes(parts.read_bytes()[:-5])  # the middle of a line, and of a chunk
    assert run_exp(train_config(**changes, output_dir=str(tmp_path / "parts"))).exit_code == 0
    assert parts.read_bytes() == (whole / NAME).read_bytes()
    ours, theirs = (json.loads((folder / "predict_results.json").read_text()) for folder in (whole, parts.parent))
    assert ours["predict_rouge-l"] == theirs["predict_rouge-l"]


@pytest.mark.long
def test_two_ranks_write_what_one_does(train_config, tmp_path, repo_dir):
    import socket

    changes = {"dataset": "rows", "val_size": 7, "max_steps": 2, "use_cpu": True, **PREDICT}
    one = run_exp(train_config(**changes, output_dir=str(tmp_path / "one"))).output_dir
    options = options_of(
        train_config, **changes | {"per_device_train_batch_size": 2}, output_dir=str(tmp_path / "two")
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [
        start(repo_dir, tmp_path, options, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in (0, 1)
    ]  # fmt: skip
    codes = [process.wait(timeout=600) for process in ranks]
    assert codes == [0, 0], (tmp_path / "errors.txt").read_text()[-5000:]
    assert (tmp_path / "two" / NAME).read_bytes() == (one / NAME).read_bytes()


@pytest.mark.long
def test_the_bundled_model_answers_as_generate_does(embedded_model_dir, repo_dir, tmp_path):
    from llamafactory.compose import load_config

    words = [str(repo_dir / "examples" / "predict" / "smollm2_sft.yaml"), f"dataset_dir={repo_dir / 'data'}",
             f"output_dir={tmp_path}", "per_device_eval_batch_size=3", "max_new_tokens=24"]  # fmt: skip
    run_exp(load_config(words))
    lines = lines_of(tmp_path)
    assert len({len(line["prompt"]) for line in lines}) > 1
    assert [line["predict"] for line in lines] == greedy(embedded_model_dir, [line["prompt"] for line in lines], 24)


def test_a_reward_model_writes_its_scores_of_both_answers(train_config, repo_dir, tmp_path):
    pairs = {"dataset": "preference_pairs", "dataset_dir": str(repo_dir / "data"), "stage": "rm", "max_samples": 7}
    trained = run_exp(train_config(**pairs, max_steps=2, save_strategy="no", output_dir=str(tmp_path / "rm")))
    changes = {"do_train": False, "do_predict": True, "dataset": (), "eval_dataset": "preference_pairs",
               "adapter_name_or_path": str(trained.output_dir), "per_device_eval_batch_size": 2}  # fmt: skip
    result = run_exp(train_config(**pairs | changes))
    lines = lines_of(result.output_dir)
    assert [list(line) for line in lines] == [["chosen", "rejected"]] * 7
    assert all(line["chosen"] == round(line["chosen"], 2) for line in lines)
    assert len({line["chosen"] for line in lines}) > 1
    found = json.loads((result.output_dir / "predict_results.json").read_text())
    chosen, rejected = (sum(line[key] for line in lines) / 7 for key in ("chosen", "rejected"))
    assert found["predict_rewards/chosen"] == pytest.approx(chosen, abs=0.01)
    assert found["predict_rewards/rejected"] == pytest.approx(rejected, abs=0.01)
    assert {"predict_loss", "predict_accuracy"} <= set(found)


def test_scored_answers_are_predicted_beside_pairs(train_config, repo_dir):
    examples = repo_dir / "examples" / "data"
    files = [str(examples / f"{name}.jsonl") for name in ("scored_answers", "pairs_with_margins")]
    keys = {"dataset": ",".join(files), "stage": "rm", "max_steps": 1, "val_size": 12, "do_predict": True}
    result = run_exp(train_config(**keys, predict_with_generate=False))
    lines = lines_of(result.output_dir)
    assert {tuple(line) for line in lines} == {("chosen", "rejected"), ("score", "label")}
    scored = [line for line in lines if "label" in line]
    mse = sum((line["score"] - line["label"]) ** 2 for line in scored) / len(scored)
    assert result.metrics["predict_mse"] == pytest.approx(mse, abs=0.05)
    assert -1 <= result.metrics["predict_pearson"] <= 1
    assert result.metrics["eval_supervised_tokens"] > 5 * len(lines)
