"""Each broken configuration gives one clear message before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llamafactory.compose import load_config, resolve_config
from llamafactory.extras.errors import ConfigError

GOOD = "model_name_or_path: model\ndataset: rows\ndo_train: true\noutput_dir: out\n"

BOMB = 'a: &a ["x","x","x","x","x","x","x","x","x","x"]\n' + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)

# name -> (text of c.yaml, what the message must contain)
BROKEN_YAML: dict[str, tuple[str, tuple[str, ...]]] = {
    "tab": ("model_name_or_path: model\n\tdataset: rows\n", ("c.yaml:2:1", "not valid YAML", "spaces, not tabs")),
    "unclosed list": ("dataset: [a, b\ndo_train: true\n", ("c.yaml:2:9", "not valid YAML")),
    "unclosed quote": ("run_name: 'abc\n", ("c.yaml:2:1", "quoted scalar")),
    "colon in text": ("default_system: You are: kind\n", ("c.yaml:1:24", "put values with `: `")),
    "duplicate key": ("seed: 1\nbf16: true\nseed: 2\n", ("c.yaml:3:1", "'seed' is given twice; first in line 1")),
    "duplicate inside": (
        "lr_scheduler_kwargs:\n  num_cycles: 1\n  num_cycles: 2\n",
        ("c.yaml:3:3", "'num_cycles' is given twice"),
    ),
    "alias bomb": (BOMB, ("more than 20000 values once aliases are expanded",)),
    "alias to itself": ("a: &a [*a]\n", ("nested deeper than 32, or refers to itself",)),
    "nested deeply": ("a: " + "[" * 5000 + "]" * 5000 + "\n", ("nested deeper than 32",)),
    "python tag": ("seed: !!python/object/apply:os.system ['true']\n", ("c.yaml:1:7", "python/object", "not allowed")),
    "own tag": ("seed: !env SEED\n", ("tag '!env' is not allowed",)),
    "binary tag": ("run_name: !!binary aGVsbG8=\n", ("tag '!!binary' is not allowed",)),
    "undefined alias": ("seed: *other\n", ("c.yaml:1:7", "undefined alias")),
    "list": ("- a\n- b\n", ("c.yaml: holds a list", "`key: value` lines")),
    "single value": ("hello\n", ("holds a single value",)),
    "two documents": ("seed: 1\n---\nseed: 2\n", ("c.yaml:2:1", "another document")),
    "key is a list": ("? [a, b]\n: 1\n", ("a key must be a name",)),
    "control character": ("run_name: a\x07b\n", ("not valid YAML",)),
    # names
    "unknown key": (
        GOOD + "learning_rte: 1e-4\n",
        ("learning_rte (c.yaml:5): unknown key", "did you mean 'learning_rate'?"),
    ),
    "unknown key with dashes": (GOOD + "learning-rate: 1e-4\n", ("did you mean 'learning_rate'?",)),
    "unknown adapter key": (GOOD + "lora_rnk: 4\n", ("lora_rnk", "did you mean 'lora_rank'")),
    "unknown key without a near one": (GOOD + "zzzz: 4\n", ("zzzz (c.yaml:5): unknown key", "--help")),
    "key of a later version": (
        GOOD + "quantization_bit: 4\n",
        ("quantization_bit (c.yaml:5): known, but not implemented in this version", "given:   4", "alternative: "),
    ),
    "liger under its other name": (
        GOOD + "use_liger_kernel: true\n",
        ("enable_liger_kernel", "not implemented", "torch_compile: true"),
    ),
    "liger": (GOOD + "enable_liger_kernel: true\n", ("enable_liger_kernel (c.yaml:5)", "torch_compile: true")),
    "tokens seen": (GOOD + "include_num_input_tokens_seen: some\n", ("include_num_input_tokens_seen", "non_padding")),
    "a chunk of 0": (GOOD + "loss_chunk_size: 0\n", ("loss_chunk_size (c.yaml:5)", "given:   0", ">= 1")),
    "a budget of 0 tokens": (GOOD + "micro_batch_tokens: 0\n", ("micro_batch_tokens (c.yaml:5)", ">= 1")),
    "CUDA graphs": (GOOD + "torch_compile_mode: reduce-overhead\n", ("torch_compile_mode", "every length")),
    "fa2 without its package": (GOOD + "flash_attn: fa2\n", ("flash_attn (c.yaml:5)", "pip install flash-attn")),
    "deepspeed": (GOOD + "deepspeed: ds_z3.json\n", ("deepspeed (c.yaml:5): cannot be read", "examples/deepspeed")),
    "method of a later version": (GOOD + "finetuning_type: oft\n", ("finetuning_type (c.yaml:5)", "not implemented")),
    "ppo without a reward": (GOOD + "stage: ppo\n", ("reward_model: stage ppo needs something that scores answers",)),
    "a service without its type": (
        GOOD + "stage: ppo\nreward_model: http://localhost/score\n",
        ("reward_model_type: a URL is a service", "reward_model_type: api"),
    ),
    "unknown stage": (GOOD + "stage: stf\n", ("stage (c.yaml:5): unknown stage", "did you mean 'sft'?")),
    "stage is a path": (GOOD + "stage: ../../x\n", ("unknown stage",)),
    "unknown method": (GOOD + "finetuning_type: lorra\n", ("unknown fine-tuning method", "did you mean 'lora'?")),
    "scheduler of a later version": (
        GOOD + "lr_scheduler_type: reduce_lr_on_plateau\n",
        ("lr_scheduler_type", "not implemented"),
    ),
    "unknown scheduler": (GOOD + "lr_scheduler_type: cosin\n", ("unknown value", "did you mean 'cosine'")),
    "unknown optimizer": (GOOD + "optim: adamw_troch\n", ("optim (c.yaml:5)", "did you mean 'adamw_torch'")),
    "unknown template": (GOOD + "template: chatlm\n", ("unknown template 'chatlm'", "did you mean", "'chatml'")),
    "unknown data set": (
        GOOD.replace("rows", "rosw"),
        ("dataset (c.yaml:2): unknown data set 'rosw'", "did you mean 'rows'?"),
    ),
    "data file missing": (GOOD.replace("rows", "gone"), ("dataset (c.yaml:2)", "gone.json")),
    "folder of data sets missing": (GOOD + "dataset_dir: nowhere\n", ("nowhere", "no such folder")),
    "unknown tracker": (GOOD + "report_to: wandbb\n", ("unknown tracker 'wandbb'", "did you mean 'wandb'?")),
    "tracker without its package": (
        GOOD + "report_to: clearml\n",
        ("clearml is not installed", "pip install clearml"),
    ),
    "tracker on a server, offline": (
        GOOD + "report_to: wandb\noffline: true\n",
        ("wandb needs the network, and offline is on", "fix:     tensorboard"),
    ),
    "rewards of a service, offline": (
        GOOD + "stage: grpo\nreward_model: http://localhost:1\nreward_model_type: api\noffline: true\n",
        ("a service is asked over the network, and offline is on", "HF_HUB_OFFLINE=1 alone"),
    ),
    # types and bounds
    "text for a number": (
        GOOD + "learning_rate: fast\n",
        ("learning_rate (c.yaml:5): wrong type: text", "given:   fast", "allowed: a number > 0"),
    ),
    "text for a count": (GOOD + "max_steps: many\n", ("wrong type: text", "a whole number >= -1")),
    "fraction for a count": (GOOD + "seed: 1.5\n", ("seed", "a whole number")),
    "true for a count": (GOOD + "cutoff_len: true\n", ("true and false are not allowed here", "a whole number >= 8")),
    "number for a switch": (GOOD + "bf16: 7\n", ("bf16 (c.yaml:5): wrong type: a number", "true or false")),
    "list for text": (GOOD + "run_name: [a, b]\n", ("wrong type: a list", "text or null", "write one value")),
    "mapping for a list": (GOOD + "eval_dataset: {a: b}\n", ("eval_dataset", "wrong type: a mapping", "commas")),
    "text for a mapping": (GOOD + "lr_scheduler_kwargs: fast\n", ("lr_scheduler_kwargs", "a mapping, or JSON text")),
    "broken JSON for a mapping": (GOOD + "lr_scheduler_kwargs: '{a: 1'\n", ("not valid JSON",)),
    "comma for a point": (GOOD + "learning_rate: 1,5\n", ("write a point for decimals",)),
    "null for a count": (GOOD + "cutoff_len: null\n", ("null is not allowed here", "leave the key out")),
    "not a number": (GOOD + "learning_rate: .nan\n", ("not a finite number",)),
    "infinite": (GOOD + "max_grad_norm: .inf\n", ("not a finite number",)),
    "negative": (GOOD + "learning_rate: -1e-4\n", ("out of range", "a number > 0")),
    "batch of none": (GOOD + "per_device_train_batch_size: 0\n", ("out of range", "a whole number >= 1")),
    "share above one": (GOOD + "warmup_ratio: 1.5\n", ("out of range", ">= 0 and <= 1")),
    "cutoff too short": (GOOD + "cutoff_len: 4\n", ("out of range", ">= 8")),
    # contradictions
    "val_size and eval_dataset": (
        GOOD + "val_size: 0.1\neval_dataset: rows\n",
        ("val_size (c.yaml:5): cannot be combined",),
    ),
    "val_size without data": (
        "model_name_or_path: model\ndo_eval: true\noutput_dir: out\nval_size: 0.1\n",
        ("no data set to hold rows out of",),
    ),
    "streaming into tokenized_path": (
        GOOD + "streaming: true\nmax_steps: 10\ntokenized_path: rows-as-ids\n",
        ("tokenized_path (c.yaml:7)", "keeps none of them", "leave tokenized_path out, or set streaming: false"),
    ),
    "val_size of 1.5 rows": (GOOD + "val_size: 1.5\n", ("neither a share nor a whole number of rows",)),
    "history and prompt": (
        GOOD + "mask_history: true\ntrain_on_prompt: true\n",
        ("mask_history (c.yaml:5): cannot be combined with train_on_prompt",),
    ),
    "last answer and calls": (
        GOOD + "mask_history: true\ntrain_on: tool_calls\n",
        ("train_on (c.yaml:6): mask_history means train_on: last",),
    ),
    "calls and prompt": (
        GOOD + "train_on: tool_calls\ntrain_on_prompt: true\n",
        ("train_on (c.yaml:5): cannot be combined with train_on_prompt",),
    ),
    "two precisions": (GOOD + "bf16: true\nfp16: true\n", ("fp16 (c.yaml:6): cannot be combined with bf16",)),
    "pure_bf16 and fp16": (GOOD + "pure_bf16: true\nfp16: true\n", ("cannot be combined with pure_bf16",)),
    "half precision on the CPU": (GOOD + "fp16: true\nuse_cpu: true\n", ("float16 training needs a GPU",)),
    "evaluation without rows": (
        GOOD + "eval_strategy: steps\n",
        ("eval_strategy (c.yaml:5)", "no rows to evaluate on"),
    ),
    "packing on and off": (GOOD + "neat_packing: true\npacking: false\n", ("neat_packing is on",)),
    "save_steps of 2.5": (GOOD + "save_steps: 2.5\n", ("neither a share nor a whole number of steps",)),
    "warmup longer than the run": (GOOD + "warmup_steps: 20\nmax_steps: 10\n", ("longer than the run of 10 steps",)),
    "schedule without its argument": (
        GOOD + "lr_scheduler_type: cosine_with_min_lr\n",
        ("needs min_lr or min_lr_rate", "lr_scheduler_kwargs: {min_lr_rate: 0.1}"),
    ),
    "same key under two names": (
        GOOD + "eval_strategy: epoch\nevaluation_strategy: steps\nval_size: 0.5\n",
        ("given twice with different values, under two names",),
    ),
    # predictions
    "prediction without rows": (
        GOOD + "do_predict: true\npredict_with_generate: true\n",
        ("do_predict (c.yaml:5)", "no rows to evaluate on"),
    ),
    "prediction without answers": (
        GOOD + "do_predict: true\nval_size: 0.5\n",
        ("do_predict (c.yaml:5)", "predict_with_generate: true"),
    ),
    "prediction of dpo": (
        GOOD + "do_predict: true\nval_size: 0.5\nstage: dpo\n",
        ("stage dpo has nothing to predict",),
    ),
    "answers of rm": (
        GOOD + "predict_with_generate: true\nval_size: 0.5\nstage: rm\n",
        ("predict_with_generate (c.yaml:5): only for stage sft, not rm",),
    ),
    "prediction of the best weights": (
        GOOD + "do_predict: true\npredict_with_generate: true\nval_size: 0.5\neval_strategy: epoch\n"
        "load_best_model_at_end: true\n",
        ("do_predict (c.yaml:5): would use the last weights",),
    ),
    "answers and accuracy": (
        GOOD + "predict_with_generate: true\nval_size: 0.5\ncompute_accuracy: true\n",
        ("cannot be combined with compute_accuracy",),
    ),
    "answers from beams": (
        GOOD + "predict_with_generate: true\nval_size: 0.5\nnum_beams: 2\nrepetition_penalty: 1.1\n",
        ("num_beams (c.yaml:7): predictions are made without beams", "repetition_penalty (c.yaml:8)"),
    ),
    "answers from beams by another name": (
        GOOD + "predict_with_generate: true\nval_size: 0.5\neval_num_beams: 4\n",
        ("num_beams (c.yaml:7): predictions are made without beams",),
    ),
    "answers under ZeRO-3": (
        GOOD + "predict_with_generate: true\nval_size: 0.5\ndeepspeed: zero3.json\n",
        ("deepspeed (c.yaml:7)",),
    ),
    # missing
    "empty file": ("", ("model_name_or_path: missing", "do_train: nothing to do", "output_dir: missing")),
    "no model": (GOOD.split("\n", 1)[1], ("model_name_or_path: missing", "SmolLM2-135M-Instruct")),
    "no data set": (GOOD.replace("dataset: rows\n", ""), ("dataset: do_train is on, but there is no data set",)),
    "nothing to do": (GOOD.replace("do_train: true\n", ""), ("do_train, do_eval and do_predict are off",)),
    # paths
    "model folder missing": (GOOD.replace("model\n", "./modle\n"), ("no such folder: ./modle", "did you mean model?")),
    "model folder without config.json": (GOOD.replace("path: model", "path: data"), ("has no config.json",)),
    "model is a file": (GOOD.replace("path: model", "path: data/rows.json"), ("is a file",)),
    "model is no name": (GOOD.replace("path: model", "path: my model!"), ("neither a folder nor a hub id",)),
    "adapter without adapter_config.json": (GOOD + "adapter_name_or_path: model\n", ("has no adapter_config.json",)),
    "adapter folder missing": (GOOD + "adapter_name_or_path: ./nowhere\n", ("no such folder: ./nowhere",)),
    "output is a file": (GOOD.replace("out\n", "data/rows.json\n"), ("output_dir (c.yaml:4): is a file",)),
    "output inside a file": (GOOD.replace("out\n", "data/rows.json/x\n"), ("rows.json is a file",)),
    "checkpoint missing": (GOOD + "resume_from_checkpoint: out/checkpoint-5\n", ("no such folder: out/checkpoint-5",)),
}


@pytest.mark.parametrize("name", BROKEN_YAML)
def test_broken_yaml_says_what_is_wrong(name: str, workspace: Path) -> None:
    text, fragments = BROKEN_YAML[name]
    (workspace / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(["c.yaml"])
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert caught.value.exit_code == 2
    assert "Traceback" not in message


def test_scores_name_the_command_that_installs_what_they_need(workspace: Path, monkeypatch) -> None:
    from llamafactory.hparams import predict_checks

    monkeypatch.setattr(predict_checks, "is_installed", lambda name: name != "jieba")
    (workspace / "c.yaml").write_text(GOOD + "predict_with_generate: true\nval_size: 0.5\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"need jieba[\s\S]*pip install \"llamafactory\[metrics\]\""):
        load_config(["c.yaml"])


BROKEN_JSON: dict[str, tuple[str, tuple[str, ...]]] = {
    "trailing comma": ('{\n  "seed": 1,\n}', ("c.json:", "not valid JSON", "no comma before a closing bracket")),
    "duplicate": ('{"seed": 1, "seed": 2}', ("'seed' is given twice",)),
    "list": ("[1]", ("holds a list",)),
    "NaN": ('{"learning_rate": NaN}', ("NaN is not a JSON number",)),
    "empty": ("", ("c.json:1:1", "not valid JSON")),
    "deep": ('{"a":' + "[" * 100_000, ("c.json",)),
    "unknown key": ('{\n\n  "sed": 1\n}', ("sed (c.json:3): unknown key", "did you mean 'seed'")),
}


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_broken_json_says_what_is_wrong(name: str, workspace: Path) -> None:
    text, fragments = BROKEN_JSON[name]
    (workspace / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(["c.json"])
    for fragment in fragments:
        assert fragment in str(caught.value)


BROKEN_WORDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "file missing": (["god.yaml"], ("god.yaml: no such file", "did you mean 'good.yaml'?")),
    "folder for a file": (["data"], ("cannot understand 'data'",)),
    "folder with the name of a file": (["folder.yaml"], ("folder.yaml: is a folder",)),
    "file of another kind": (["notes.txt"], ("not a configuration file", ".yaml")),
    "not text": (["binary.yaml"], ("not UTF-8 text",)),
    "too large": (["large.yaml"], ("larger than 1 MB",)),
    "stray word": (["good.yaml", "seed", "7"], ("cannot understand 'seed'", "cannot understand '7'")),
    "single dash": (["good.yaml", "-seed", "7"], ("cannot understand '-seed'",)),
    "switch with a wrong value": (
        ["good.yaml", "--bf16", "maybe"],
        ("bf16 (command line): wrong type", "given:   maybe"),
    ),
    "two values for one": (["good.yaml", "--seed", "1", "2"], ("seed (command line)", "wrong type: a list")),
    "override with a wrong value": (["good.yaml", "seed=x"], ("seed (command line)", "given:   x")),
    "entry of no mapping": (["good.yaml", "seed.x=1"], ("seed.x (command line): unknown key",)),
}


@pytest.mark.parametrize("name", BROKEN_WORDS)
def test_broken_words_say_what_is_wrong(name: str, workspace: Path) -> None:
    (workspace / "good.yaml").write_text(GOOD, encoding="utf-8")
    (workspace / "notes.txt").write_text("x", encoding="utf-8")
    (workspace / "binary.yaml").write_bytes(b"a: \xff\xfe\n")
    (workspace / "large.yaml").write_bytes(b"#" * 1_100_000)
    (workspace / "folder.yaml").mkdir()
    words, fragments = BROKEN_WORDS[name]
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_all_problems_come_in_one_report(good: dict[str, Any]) -> None:
    broken = good | {"learning_rate": "x", "sed": 1, "bf16": True, "fp16": True, "template": "nope", "lora_rank": 0}
    resolution = resolve_config(broken)
    assert resolution.config is None
    assert {problem.key for problem in resolution.problems} == {
        "learning_rate",
        "sed",
        "fp16",
        "template",
        "lora_rank",
    }
    assert str(ConfigError(resolution.problems)).startswith("5 problems in the configuration:\n1. ")


def test_a_mistyped_key_does_not_also_count_as_missing(good: dict[str, Any]) -> None:
    good["datset"] = good.pop("dataset")
    assert [problem.key for problem in resolve_config(good).problems] == ["datset"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_cannot_be_written(workspace: Path, good: dict[str, Any]) -> None:
    locked = workspace / "locked"
    locked.mkdir(mode=0o500)
    problems = resolve_config(good | {"output_dir": str(locked / "out")}).problems
    assert [problem.key for problem in problems] == ["output_dir"]
    assert "cannot be written" in problems[0].message


@pytest.mark.parametrize("name", ["My Läufe/größter Lauf", "a b", "日本語"])
def test_output_folder_may_have_spaces_and_umlauts(name: str, workspace: Path, good: dict[str, Any]) -> None:
    (workspace / "c.json").write_text(json.dumps(good | {"output_dir": name}), encoding="utf-8")
    assert load_config(["c.json"]).train.output_dir == name


@pytest.mark.parametrize(
    ("command", "missing"),
    [("train", {"model_name_or_path", "do_train", "output_dir"}), ("chat", {"model_name_or_path"})]
    + [("export", {"model_name_or_path", "export_dir"})],
)
def test_each_command_names_its_required_keys(command: str, missing: set[str]) -> None:
    assert {problem.key for problem in resolve_config({}, command=command).problems} == missing


def test_a_broken_form_and_a_broken_file_are_both_reported(workspace: Path) -> None:
    problems = resolve_config(["nowhere.yaml", "stray"]).problems
    assert [problem.origin for problem in problems] == ["nowhere.yaml", "command line"]


def test_keys_of_a_dict_must_be_text() -> None:
    (problem,) = resolve_config({1: "x"}).problems  # type: ignore[dict-item]
    assert "key 1 is not text" in problem.message
