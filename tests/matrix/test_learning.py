"""The bundled model learns what each preference stage teaches, judged on rows that were held out."""

from __future__ import annotations

import json
import math

import pytest

from llamafactory.compose import load_config
from llamafactory.train.tuner import run_exp

pytestmark = pytest.mark.long


def learn(tmp_path, **keys):
    """Evaluations before and after a short run, and the rows of its log."""
    options = {
        "model_name_or_path": "SmolLM2-135M-Instruct", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "output_dir": str(tmp_path / "out"), "template": "auto", "cutoff_len": 128, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "num_train_epochs": 2, "learning_rate": 5e-4, "logging_steps": 1,
        "eval_strategy": "epoch", "eval_on_start": True, "save_strategy": "no", "warmup_steps": 2,
    }  # fmt: skip
    result = run_exp(load_config(options | keys))
    assert result.exit_code == 0
    rows = [json.loads(line) for line in (result.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    return evaluations[0], evaluations[-1], [row for row in rows if "loss" in row]


LOSSES = {
    "sigmoid": {"stage": "dpo", "pref_loss": "sigmoid"},
    "orpo": {"stage": "dpo", "pref_loss": "orpo", "learning_rate": 1e-3},
    "simpo": {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "num_train_epochs": 3, "cutoff_len": 128},
    "kto": {"stage": "kto", "learning_rate": 1e-3},
}


def write_shortest(folder, source, name, count):
    """The demo's `count` shortest rows as the data set `rows`; of judged answers, as many liked as not."""
    rows = sorted(json.loads((source / f"{name}.json").read_text()), key=lambda row: len(json.dumps(row)))
    if name == "kto_en_demo":
        sides = [[row for row in rows if row["label"] is wanted][: count // 2] for wanted in (True, False)]
        rows = [row for pair in zip(*sides, strict=True) for row in pair]
    (folder / "rows.json").write_text(json.dumps(rows[:count]))
    entry = json.loads((source / "dataset_info.json").read_text())[name] | {"file_name": "rows.json"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))


@pytest.mark.parametrize("name", LOSSES)
def test_the_margin_of_held_out_rows_rises(name, shared_dir, embedded_model_dir, tmp_path):
    """Training rows differ from step to step, so margins are compared on the held-out rows, before and after."""
    dataset = "kto_en_demo" if name == "kto" else "dpo_en_demo"
    write_shortest(tmp_path, shared_dir / "data", dataset, 16 if name == "orpo" else 24)
    before, after, rows = learn(
        tmp_path, dataset="rows", dataset_dir=str(tmp_path), val_size=8, **{"cutoff_len": 256} | LOSSES[name]
    )
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    if name == "sigmoid":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
        assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    if name == "kto":
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-3)


def test_a_reward_model_ranks_rows_that_it_has_not_seen(embedded_model_dir, tmp_path):
    kind = ["Of course, gladly.", "Happy to help with that.", "Good question, here you go.", "Sure, with pleasure."]
    rude = ["No.", "Leave me alone.", "Find out yourself.", "What a stupid question."]
    things = ["rivers", "the moon", "bread", "chess", "clouds", "tea", "cats", "glass", "salt", "bees", "iron", "snow"]
    rows = [
        {
            "conversations": [{"from": "human", "value": f"Tell me something about {thing}, please ({number})."}],
            "chosen": {"from": "gpt", "value": kind[(number + place) % 4]},
            "rejected": {"from": "gpt", "value": rude[(number * 3 + place) % 4]},
        }
        for number in range(4)
        for place, thing in enumerate(things)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "ranking": True,
             "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    _, after, _ = learn(tmp_path, stage="rm", dataset="rows", dataset_dir=str(tmp_path), val_size=16)
    assert after["eval_accuracy"] >= 0.8
    assert (tmp_path / "out" / "value_head.safetensors").is_file()


def test_a_reward_model_gives_answers_that_it_has_not_seen_their_scores(embedded_model_dir, tmp_path):
    """The oracle is the best constant: the mean score has the labels' variance as its error, and no correlation."""
    answers = {
        1.0: ["Of course, gladly.", "Happy to help with that.", "Good question, here you go.", "Sure, with pleasure."],
        0.0: ["It depends.", "That is known.", "There are many.", "Some say so."],
        -1.0: ["No.", "Leave me alone.", "Find out yourself.", "What a stupid question."],
    }
    things = ["rivers", "the moon", "bread", "chess", "clouds", "tea", "cats", "glass", "salt", "bees", "iron", "snow"]
    rows = [
        {"instruction": f"Tell me something about {thing}, please ({number}).", "output": texts[(number + place) % 4],
         "score": score}
        for number in range(2)
        for place, thing in enumerate(things)
        for score, texts in answers.items()
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    before, after, log = learn(
        tmp_path, stage="rm", dataset=str(tmp_path / "rows.json"), val_size=18, num_train_epochs=1,
    )  # fmt: skip
    assert after["eval_mse"] < 0.5 * 2 / 3  # the variance of three scores that are equally frequent
    assert after["eval_mse"] < before["eval_mse"]
    assert after["eval_pearson"] > 0.8
    assert after["eval_loss"] == pytest.approx(after["eval_mse"])  # every row is a single answer
    assert "eval_accuracy" not in after
    assert log[-1]["loss"] < log[0]["loss"]
