"""What is killed: configurations of a short run on the tiny model. A stage or a method more is one entry more."""

from __future__ import annotations

COMMON = {
    "dataset": "rows", "template": "chatml", "do_train": "true", "per_device_train_batch_size": "2",
    "learning_rate": "1e-2", "num_train_epochs": "3", "logging_steps": "1", "save_steps": "2", "cutoff_len": "64",
    "use_cpu": "true", "save_total_limit": "3",
}  # fmt: skip
GRPO = {
    "stage": "grpo", "dataset": "prompts", "reward_functions": "{folder}/rewards.py:evenness", "max_new_tokens": "6",
    "num_generations": "4", "num_train_epochs": "1", "log_completions": "0",
}  # fmt: skip
PPO = {**{key: value for key, value in GRPO.items() if key != "num_generations"}, "stage": "ppo", "ppo_epochs": "2"}
STREAMED = {"streaming": "true", "max_steps": "20", "buffer_size": "5"}
CELLS: dict[str, dict[str, str]] = {
    "sft lora": {},
    "sft lora dropout, accumulation": {"lora_dropout": "0.3", "gradient_accumulation_steps": "2", "save_steps": "1"},
    "sft lora packed": {"packing": "true"},
    "sft full": {"finetuning_type": "full"},
    "sft full packed, bf16": {"finetuning_type": "full", "packing": "true", "bf16": "true"},
    "sft lora evaluated, best kept": {
        "val_size": "4", "eval_strategy": "steps", "eval_steps": "2", "load_best_model_at_end": "true",
        "save_total_limit": "1",
    },
    "sft lora saved in the main thread": {"async_save": "false", "save_steps": "1"},
    "dpo lora": {"stage": "dpo", "dataset": "pairs"},
    "dpo full": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "full"},
    "kto lora": {"stage": "kto", "dataset": "judged"},
    "rm lora": {"stage": "rm", "dataset": "pairs"},
    "pt full, packed": {"stage": "pt", "dataset": "texts", "finetuning_type": "full", "cutoff_len": "48"},
    "sft lora, streamed": STREAMED,
    "sft full, streamed from two sources, packed": {
        **STREAMED, "dataset": "rows,more", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3",
        "packing": "true", "finetuning_type": "full", "save_steps": "1", "gradient_accumulation_steps": "2",
    },
    "dpo lora, streamed": {**STREAMED, "stage": "dpo", "dataset": "pairs"},
    "grpo lora": GRPO,
    "grpo lora, two passes over each rollout": {**GRPO, "grpo_epochs": "2", "save_steps": "1"},
    "sft full, adafactor in pure bf16": {"finetuning_type": "full", "pure_bf16": "true", "optim": "adafactor"},
    "sft lora and norms in full, bf16": {"additional_target": "norm,embed_tokens", "bf16": "true"},
    "ppo lora, two passes in two parts, answers in evaluations": {
        **PPO, "ppo_buffer_size": "2", "lora_dropout": "0.2", "save_steps": "1", "per_device_train_batch_size": "1",
        "val_size": "4", "eval_strategy": "steps", "eval_steps": "3",
    },
    "pt lora, streamed": {**STREAMED, "stage": "pt", "dataset": "texts", "cutoff_len": "48"},
    "sft lora, two sources drawn and packed anew in each epoch": {
        "dataset": "rows,more", "mix_strategy": "interleave_over", "interleave_probs": "0.6,0.4", "packing": "true",
    },
    "sft lora padded, cosine": {"flash_attn": "disabled", "lr_scheduler_type": "cosine", "warmup_ratio": "0.2"},
}  # fmt: skip
_PAIR = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
_JUDGED = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
DATASETS = {
    "rows": {"file_name": "rows.json"},
    "more": {"file_name": "more.jsonl"},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": _PAIR},
    "judged": {"file_name": "judged.json", "columns": _JUDGED},
    "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
    "prompts": {"file_name": "rows.json", "columns": {"prompt": "instruction"}},
}
"""The `dataset_info.json` beside the rows."""

REWARDS = """
def evenness(completions):
    return [sum(ord(letter) % 2 == 0 for letter in text) / (1 + len(text)) for text in completions]
"""
"""A Python reward function of a user, `rewards.py`."""
