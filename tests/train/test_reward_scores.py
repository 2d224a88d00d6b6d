"""Scores of a reward model: from its adapter, its full weights and its export, in any batch, as plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llamafactory.commands import score
from llamafactory.compose import load_config
from llamafactory.export import export_and_verify
from llamafactory.extras.errors import ConfigError, LlamaFactoryError
from llamafactory.train.reward_scores import score_rows
from llamafactory.train.tuner import run_exp

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {place}?"},
            {"role": "assistant", "content": "Yes. " * place},
        ]
    }
    for place in range(1, 8)
]


@pytest.fixture(scope="module")
def made(tiny_model_dir, repo_dir, tmp_path_factory):
    """Folders of reward models: `lora`, `full`, and `merged`, which is the export of `lora`."""
    folder = tmp_path_factory.mktemp("rewards")
    for method in ("lora", "full"):
        words = {
            "model_name_or_path": str(tiny_model_dir), "stage": "rm", "do_train": True, "dataset": "preference_pairs",
            "dataset_dir": str(repo_dir / "data"), "template": "chatml", "max_samples": 8, "max_steps": 2,
            "per_device_train_batch_size": 4, "output_dir": str(folder / method), "learning_rate": 1e-2,
            "finetuning_type": method, "save_strategy": "no",
        }  # fmt: skip
        assert run_exp(load_config(words)).exit_code == 0
    merged = {
        "model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(folder / "lora"), "template": "chatml",
        "export_dir": str(folder / "merged"), "infer_dtype": "float32",
    }  # fmt: skip
    assert export_and_verify(load_config(merged, command="export")).passed
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def scored(made, repo_dir, model, **changes):
    names = {
        "lora": {"adapter_name_or_path": str(made / "lora")},
        "full": {"model_name_or_path": str(made / "full")},
        "merged": {"model_name_or_path": str(made / "merged")},
    }
    options = {"dataset": str(made / "rows.jsonl"), "template": "chatml", "infer_dtype": "float32", "use_cpu": True}
    return list(score_rows(load_config(options | names[model] | changes, command="score")))


@pytest.mark.parametrize("layout", ["auto", "disabled"])
def test_adapter_and_export_score_as_plain_transformers_does(made, repo_dir, tiny_model_dir, layout):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = {"model_name_or_path": str(tiny_model_dir), "flash_attn": layout}
    found = [scored(made, repo_dir, "lora", **base), scored(made, repo_dir, "merged", flash_attn=layout)]
    assert [line["row"] for line in found[0]] == [f"rows.jsonl:{place}" for place in range(1, 8)]
    model = AutoModelForSequenceClassification.from_pretrained(made / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "merged")
    for lines in found:
        for line, row in zip(lines, ROWS, strict=True):
            user, assistant = (message["content"] for message in row["messages"])
            text = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
            with torch.no_grad():
                theirs = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]
            assert line["score"] == pytest.approx(float(theirs), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(made, repo_dir):
    found = [
        [line["score"] for line in scored(made, repo_dir, "full", per_device_eval_batch_size=size)] for size in (1, 3)
    ]
    assert len(set(found[0])) == 7
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_pairs_have_both_scores_and_a_bad_row_has_its_reason(made, repo_dir, tmp_path):
    pair = {"instruction": "Hi?", "chosen": "Hello.", "rejected": "No."}
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair | {"chosen": ""}, pair]))
    lines = scored(made, repo_dir, "full", dataset=str(tmp_path / "pairs.json"))
    assert [sorted(line) for line in lines] == [["chosen", "rejected", "row"]] * 2 + [["error", "row", "score"]]
    assert lines[0]["chosen"] == pytest.approx(lines[1]["chosen"])
    assert lines[2]["row"] == "pairs.json#2"
    assert "empty" in lines[2]["error"]


def test_the_command_writes_lines_and_a_summary(made, capsys, tmp_path):
    words = [
        f"model_name_or_path={made / 'full'}", f"dataset={made / 'rows.jsonl'}", "template=chatml", "use_cpu=true",
        "infer_dtype=float32",
    ]  # fmt: skip
    assert score.main(words) == 0
    printed = capsys.readouterr()
    assert len([json.loads(line) for line in printed.out.splitlines()]) == 7
    assert "7 rows scored: mean" in printed.err
    assert score.main([*words, "--output", str(tmp_path / "scores.jsonl"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (tmp_path / "scores.jsonl").read_text() == printed.out
    assert summary["rows"] == 7
    assert summary["min"] <= summary["mean"] <= summary["max"]
    with pytest.raises(ConfigError, match="is there already"):
        score.main([*words, f"--output={tmp_path / 'scores.jsonl'}"])
    with pytest.raises(ConfigError, match="--output: cannot be written: No such file"):
        score.main([*words, f"--output={tmp_path / 'nowhere' / 'scores.jsonl'}"])
    with pytest.raises(LlamaFactoryError):
        score.main([*words, f"dataset={made / 'no rows.jsonl'}", f"--output={tmp_path / 'more.jsonl'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(made, tmp_path):
    words = [f"model_name_or_path={made / 'full'}", f"dataset={made / 'rows.jsonl'}", "template=chatml"]
    (tmp_path / ".scores.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(LlamaFactoryError, match=r"scores.jsonl cannot be written: No space left on device"):
        score.main([*words, "use_cpu=true", f"--output={tmp_path / 'scores.jsonl'}"])
    assert not any(tmp_path.iterdir())


def test_what_is_no_reward_model_is_refused(made, repo_dir, tiny_model_dir):
    with pytest.raises(LlamaFactoryError, match="so that it is no reward model"):
        scored(made, repo_dir, "full", model_name_or_path=str(tiny_model_dir))
    with pytest.raises(LlamaFactoryError, match="has its adapter inside"):
        scored(made, repo_dir, "merged", adapter_name_or_path=str(made / "lora"))
    with pytest.raises(ConfigError, match="dataset: missing"):
        load_config({"model_name_or_path": str(made / "full")}, command="score")
