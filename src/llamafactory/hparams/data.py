"""Options of the data: which rows, which template, which tokens carry loss, how rows become batches."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import model_validator

from llamafactory.hparams.section import Section, option

_SOURCE, _TEMPLATE, _LOSS, _BATCH = "Data source", "Template", "Loss mask", "Rows and batches"


class DataConfig(Section):
    """Which data sets are read and how a row becomes token ids and labels."""

    dataset: tuple[str, ...] = option((), "Names of training data sets in dataset_info.json.", group=_SOURCE)
    eval_dataset: tuple[str, ...] = option((), "Names of evaluation data sets.", group=_SOURCE)
    dataset_dir: str | dict[str, Any] = option(
        "data", "Folder with dataset_info.json, or the content of that file.", group=_SOURCE
    )
    media_dir: str | None = option(
        None, "Folder in which paths of images, videos and audios begin; null: dataset_dir.", group=_SOURCE
    )
    max_samples: int | None = option(
        None, "Use only the first rows of each data set, at most this many.", group=_SOURCE, ge=1
    )
    val_size: float = option(
        0.0, "Held-out rows for evaluation: a share below 1, or a number of rows.", group=_SOURCE, ge=0
    )
    eval_on_each_dataset: bool = option(False, "Report metrics for each evaluation data set.", group=_SOURCE)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = option(
        "concat", "How data sets make an epoch: one after another, or until the first or all run out.", group=_SOURCE
    )
    interleave_probs: tuple[float, ...] = option(
        (), "Share of each data set when interleaving; empty takes turns.", group=_SOURCE
    )
    streaming: bool = option(False, "Read and tokenise rows while training goes on; needs max_steps.", group=_SOURCE)
    buffer_size: int = option(
        16384, "Rows among which streaming shuffles; max_bad_rows counts from as many on.", group=_SOURCE, ge=1
    )
    data_variables: dict[str, str] = option(
        {}, "Values for {{key}} placeholders in rows, for example name and author.", group=_SOURCE
    )
    max_bad_rows: float = option(
        0.01, "Stop when a larger share of rows than this cannot be used.", group=_SOURCE, ge=0, le=1
    )
    template: str | None = option(None, "Chat template; null or auto takes the tokenizer's own.", group=_TEMPLATE)
    default_system: str | None = option(None, "System text where a row has none.", group=_TEMPLATE)
    enable_thinking: bool | None = option(
        True,
        "Reasoning models: true trains thoughts, false trains without, null as the rows are. The tokenizer's own "
        "template is given true or false where that is set, and nothing where it is null or left out.",
        group=_TEMPLATE,
    )
    preserve_thinking: bool = option(
        False, "Keep the thoughts of past turns before a new answer, where the template can.", group=_TEMPLATE
    )
    tool_format: str | None = option(
        None, "Syntax of tool calls of a named template; null takes the template's own.", group=_TEMPLATE
    )
    train_on_prompt: bool = option(False, "Prompts carry loss too.", group=_LOSS)
    mask_history: bool = option(False, "Only the last answer carries loss; the same as train_on: last.", group=_LOSS)
    train_on: Literal["all", "last", "tool_calls"] | None = option(
        None,
        "Answers that carry loss: all, the last, or those that call tools; null: all, or the last with mask_history. "
        "train and weight marks of single messages beat it.",
        group=_LOSS,
    )
    rewritten_history: Literal["split", "last"] = option(
        "split",
        "Where a template writes earlier answers otherwise than they were generated: split makes a sequence of each "
        "answer, last trains only the last one.",
        group=_LOSS,
    )
    tokenized_path: str | None = option(
        None, "Folder for the tokenised rows: filled by the first run, read (and checked) by later ones.", group=_BATCH
    )
    overwrite_cache: bool = option(False, "Tokenise again, whatever the cache holds.", group=_BATCH)
    cutoff_len: int = option(2048, "Longest example, in tokens.", group=_BATCH, ge=8)
    overlong: Literal["truncate", "drop", "error"] = option(
        "truncate", "What happens to an example longer than cutoff_len.", group=_BATCH
    )
    packing: bool | None = option(
        None, "Put several examples into one sequence; null lets the memory plan decide.", group=_BATCH
    )
    neat_packing: bool = option(
        False, "Packed examples never see each other (always so here); turns packing on.", group=_BATCH
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_thinking_to_the_tokenizer(cls, values: Any) -> Any:
        """Without a word on thinking, the tokenizer's own template is told nothing either, as servers do."""
        if isinstance(values, dict) and cast("dict[str, Any]", values).get("template") in (None, "auto"):
            return {"enable_thinking": None, **values}
        return values

    @property
    def answers_trained(self) -> Literal["all", "last", "tool_calls"]:
        """`train_on`, with what `mask_history` says where that is null."""
        return self.train_on or ("last" if self.mask_history else "all")
