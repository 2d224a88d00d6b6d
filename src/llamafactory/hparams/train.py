"""Options of a training run: method, batches, optimizer, schedule, precision, what is saved and logged."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import field_validator

from llamafactory.hparams.section import Section, option

_METHOD, _BATCH, _OPTIM, _SCHEDULE = "Method", "Batch and length", "Optimizer", "Learning-rate schedule"
_SHARDING = "Sharding"
_PRECISION, _OUTPUT, _EVAL, _LOG, _PROFILE = (
    "Precision and device",
    "Output and checkpoints",
    "Evaluation",
    "Logging",
    "Profiler",
)

LrScheduler: TypeAlias = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
"""The schedules of transformers that depend on the step alone."""


class TrainConfig(Section):
    """How a run trains. The names and defaults are those of transformers' `TrainingArguments`."""

    stage: str = option("sft", "Training stage: a file in train/stages, or a dotted path.", group=_METHOD)
    finetuning_type: str = option(
        "lora", "What is trained: a file in model/adapters, or a dotted path.", group=_METHOD
    )
    do_train: bool = option(False, "Train.", group=_METHOD)
    do_eval: bool = option(
        False, "Evaluate without training; a run with evaluation data always ends with an evaluation.", group=_METHOD
    )
    do_predict: bool = option(
        False,
        "Write generated_predictions.jsonl for the evaluation rows: answers (sft), scores (rm).",
        group=_METHOD,
    )
    predict_with_generate: bool = option(
        False, "Write answers in prediction and evaluation, and score them: ROUGE-1, 2, L and BLEU-4.", group=_METHOD
    )
    seed: int = option(42, "Seed of everything that is random.", group=_METHOD, ge=0, lt=2**32)
    data_seed: int | None = option(None, "Seed of the order of rows; null takes seed.", group=_METHOD, ge=0, lt=2**32)
    full_determinism: bool = option(False, "Use only deterministic kernels (slower).", group=_METHOD)
    disable_shuffling: bool = option(False, "Take rows in the order of the files.", group=_METHOD)

    per_device_train_batch_size: int = option(8, "Examples per device and step.", group=_BATCH, ge=1)
    per_device_eval_batch_size: int = option(8, "Examples per device in evaluation.", group=_BATCH, ge=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", group=_BATCH, ge=1)
    micro_batch_tokens: int | None = option(
        None,
        "Tokens of one forward pass, padding included; null lets the plan decide. The optimizer step stays the same.",
        group=_BATCH,
        ge=1,
    )
    loss_chunk_size: int | None = option(
        None, "Supervised tokens whose logits exist at once; null lets the plan decide.", group=_BATCH, ge=1
    )
    num_train_epochs: float = option(3.0, "Passes over the data; used where max_steps is not set.", group=_BATCH, gt=0)
    max_steps: int = option(-1, "Optimizer steps; -1 means num_train_epochs decides.", group=_BATCH, ge=-1)

    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"] = option(
        "adamw_torch_fused", "Optimizer.", group=_OPTIM
    )
    learning_rate: float = option(5e-5, "Highest learning rate.", group=_OPTIM, gt=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", group=_OPTIM, ge=0)
    adam_beta1: float = option(0.9, "Adam's first decay rate.", group=_OPTIM, ge=0, lt=1)
    adam_beta2: float = option(0.999, "Adam's second decay rate.", group=_OPTIM, ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "Adam's epsilon.", group=_OPTIM, gt=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 turns clipping off.", group=_OPTIM, ge=0)

    neftune_noise_alpha: float | None = option(
        None, "Noise on the embeddings while training (NEFTune, arXiv 2310.05914); 5 is usual.", group=_OPTIM, gt=0
    )
    lr_scheduler_type: LrScheduler = option("linear", "Shape of the learning rate over the run.", group=_SCHEDULE)
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None, "More arguments of the schedule, for example {num_cycles: 2}.", group=_SCHEDULE
    )
    warmup_steps: float = option(
        0, "Steps over which the learning rate rises; below 1 it is a share of all steps.", group=_SCHEDULE, ge=0
    )
    warmup_ratio: float = option(
        0.0, "Share of all steps over which the learning rate rises.", group=_SCHEDULE, ge=0, le=1
    )

    bf16: bool = option(False, "Train in bfloat16 mixed precision.", group=_PRECISION)
    fp16: bool = option(False, "Train in float16 mixed precision with loss scaling.", group=_PRECISION)
    pure_bf16: bool = option(False, "Keep weights and optimizer in bfloat16, without autocast.", group=_PRECISION)
    use_cpu: bool = option(False, "Use the CPU even where there is a GPU.", group=_PRECISION)
    ignore_plan: bool = option(
        False, "Start even where the memory forecast says that the run cannot fit.", group=_PRECISION
    )
    torch_compile: bool = option(
        False, "Compile the model's own blocks with torch.compile; the first steps take far longer.", group=_PRECISION
    )
    torch_compile_backend: str | None = option(
        None, "Backend of torch.compile; null is inductor. Turns torch_compile on.", group=_PRECISION
    )
    torch_compile_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = option(
        None, "Mode of the inductor backend. Turns torch_compile on.", group=_PRECISION
    )
    ddp_timeout: int = option(1800, "Seconds that one process waits for another.", group=_PRECISION, ge=1)

    fsdp: bool | str | None = option(
        None,
        "Spread weights, gradients and optimizer over the processes (FSDP2): true, full_shard or shard_grad_op.",
        group=_SHARDING,
    )
    fsdp_config: dict[str, Any] | str | None = option(
        None, "More of it, as transformers names it: a mapping, or a JSON file.", group=_SHARDING
    )
    deepspeed: dict[str, Any] | str | None = option(
        None, "A DeepSpeed configuration (mapping or JSON file); FSDP2 spreads what its ZeRO stage spreads.",
        group=_SHARDING,
    )  # fmt: skip

    output_dir: str | None = option(None, "Folder for weights, checkpoints, logs and reports.", group=_OUTPUT)
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds a run.", group=_OUTPUT)
    resume_from_checkpoint: str | bool | None = option(
        None, "Checkpoint folder to go on from; true means the newest one in output_dir.", group=_OUTPUT
    )
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "When checkpoints are written.", group=_OUTPUT)
    save_steps: float = option(500, "Steps between checkpoints; below 1 a share of all steps.", group=_OUTPUT, gt=0)
    save_total_limit: int | None = option(None, "Checkpoints kept; older ones are removed.", group=_OUTPUT, ge=1)
    save_only_model: bool = option(
        False, "Checkpoints without optimizer; such a run cannot be resumed.", group=_OUTPUT
    )
    async_save: bool | None = option(
        None, "Write checkpoints while training goes on; null does so where memory has room for a copy.", group=_OUTPUT
    )
    verify_after_save: bool = option(
        False, "Read every checkpoint back and compare hashes before an older one goes.", group=_OUTPUT
    )
    save_grace: float = option(
        30, "Seconds from a signal that stops the run until the save must have begun.", group=_OUTPUT, gt=0
    )
    allow_change: tuple[str, ...] = option(
        (),
        "Keys that may differ from those of the run that is continued; data and tokenizer let those differ.",
        group=_OUTPUT,
    )
    rerun_of: str | None = option(
        None, "A run.json that this run repeats: what differs in rows and versions is said.", group=_OUTPUT
    )
    on_nan: str = option(
        "stop",
        "What a loss or gradient that is not finite does: stop, or skip:N to leave out up to N such steps.",
        group=_OPTIM,
        pattern=r"^(stop|skip:[1-9][0-9]*)$",
    )

    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When the run is evaluated.", group=_EVAL)
    eval_steps: float | None = option(
        None, "Steps between evaluations; below 1 a share of all steps; null takes logging_steps.", group=_EVAL, gt=0
    )
    eval_on_start: bool = option(False, "Evaluate before the first step.", group=_EVAL)
    load_best_model_at_end: bool = option(
        False, "Save every best evaluation, and end with those weights instead of the last.", group=_EVAL
    )
    metric_for_best_model: str | None = option(
        None, "Metric that says which evaluation is best; null takes the loss.", group=_EVAL
    )
    greater_is_better: bool | None = option(
        None, "Whether that metric is better when larger; null: unless it is a loss.", group=_EVAL
    )
    early_stopping_steps: int | None = option(
        None, "Stop after so many evaluations in a row that are no better.", group=_EVAL, ge=1
    )

    logging_steps: float = option(500, "Steps between log lines; below 1 a share of all steps.", group=_LOG, gt=0)
    logging_first_step: bool = option(False, "Log the first step too.", group=_LOG)
    report_to: tuple[str, ...] = option(
        (), "Trackers, for example tensorboard or wandb; none for no tracker.", group=_LOG
    )
    run_name: str | None = option(None, "Name of the run in trackers and on the model card.", group=_LOG)
    plot_loss: bool = option(False, "Write training_loss.png.", group=_LOG)
    include_effective_tokens_per_second: bool = option(False, "Report tokens per second without padding.", group=_LOG)
    include_num_input_tokens_seen: bool | Literal["all", "non_padding", "no"] = option(
        False, "Report the number of tokens seen (always recorded here, without padding).", group=_LOG
    )
    disable_tqdm: bool | None = option(None, "No progress bar; null shows one on a terminal.", group=_LOG)

    enable_torch_profiler: bool = option(
        False, "Record a few steps with torch's profiler, and say where the time went.", group=_PROFILE
    )
    profiler_output_dir: str | None = option(
        None, "Folder of the traces; null is <output_dir>/profiler.", group=_PROFILE
    )
    profiler_wait_steps: int = option(1, "Steps before the profiler warms up.", group=_PROFILE, ge=0)
    profiler_warmup_steps: int = option(1, "Steps that the profiler runs without recording.", group=_PROFILE, ge=0)
    profiler_active_steps: int = option(1, "Steps that are recorded.", group=_PROFILE, ge=1)
    profiler_repeat: int = option(1, "Times that this is repeated; 0 until the run ends.", group=_PROFILE, ge=0)
    profiler_record_shapes: bool = option(True, "Record the shapes of operands.", group=_PROFILE)
    profiler_profile_memory: bool = option(True, "Record memory.", group=_PROFILE)
    profiler_with_stack: bool = option(True, "Record the Python stack of each operator.", group=_PROFILE)

    @property
    def max_skipped(self) -> int:
        """Steps that are not finite and may be left out (`on_nan`)."""
        return int(self.on_nan.removeprefix("skip:")) if self.on_nan != "stop" else 0

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled; a backend or a mode asks for it too, as in transformers."""
        return self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None

    @field_validator("report_to")
    @classmethod
    def _without_none(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return () if names == ("none",) else names
