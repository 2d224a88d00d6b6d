"""Config -> a stream of training examples, and evaluation sets that are read whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llamafactory.data.data_report import DataReport
from llamafactory.data.encoded_rows import RowEncoder
from llamafactory.data.pipeline import PreparedData, as_read, prepare_data
from llamafactory.data.registry import find_specs
from llamafactory.data.stream import ExampleStream, streamed_report
from llamafactory.data.stream_rows import StreamOptions
from llamafactory.data.types import SourceAccess, Template, ViewName
from llamafactory.data.views import find_view, fit_spec
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import warn
from llamafactory.hparams.data import DataConfig


def prepare_stream(
    data: DataConfig,
    template: Template,
    tokenizer: Any,
    *,
    seed: int,
    view: ViewName = "sft",
    access: SourceAccess | None = None,
    shuffle: bool = True,
    output_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> PreparedData:
    """Open the training data sets of the config as a stream.

    `val_size` holds out the first rows of each data set, which are then evaluated in memory, as `eval_dataset` is.

    Args:
        data: which data sets, and how rows become ids and labels.
        template: writes conversations.
        tokenizer: a transformers tokenizer with a Rust backend.
        seed: of mixing and shuffling.
        view: how the stage reads rows.
        access: tokens and folders of hubs.
        shuffle: False keeps the order of the rows.
        output_dir: where `bad_rows.jsonl` goes if rows are lost; None: nowhere.
        cache_dir: where tokenised evaluation rows are kept; None: this user's cache folder.

    Raises:
        DataError: unreadable data, or no row among the first that can be used.
    """
    access = access or SourceAccess(media_dir=data.media_dir)
    found = find_specs(data.dataset, data.dataset_dir, replace(access, is_streaming=True))
    specs = [fit_spec(spec, find_view(view)) for spec in found]
    for spec in specs:
        if spec.num_samples is not None:
            warn(f"{spec.name}: num_samples has no effect with streaming")
    options = StreamOptions(
        strategy=data.mix_strategy,
        probs=data.interleave_probs or None,
        buffer_size=data.buffer_size if shuffle else 1,
        seed=seed,
        max_samples=data.max_samples,
        num_held_out=_spread(int(data.val_size), len(specs)),
        max_bad_rows=data.max_bad_rows,
        variables=data.data_variables,
    )
    rows = RowEncoder.from_config(data, view, template, tokenizer)
    stream = ExampleStream(specs, rows, options, output_dir)
    if not stream.sample.num_groups:
        raise DataError(
            "none of the first rows of the stream can be used",
            where=", ".join(data.dataset),
            found="no example in them",
            expected="at least one answer within cutoff_len",
            fix="data check shows what is wrong with the rows",
        )
    evaluation = {"eval": as_read(stream.held_out(), data, view)} if data.val_size else {}
    reports = [streamed_report(spec) for spec in specs]
    if data.eval_dataset:
        whole = prepare_data(
            data.model_copy(update={"dataset": (), "val_size": 0.0}),
            template,
            tokenizer,
            seed=seed,
            view=view,
            access=access,
            for_training=False,
            output_dir=output_dir,
            cache_dir=cache_dir,
        )
        evaluation, reports = {**whole.evaluation}, [*reports, *whole.report.datasets]
    num_evaluation = {name: len(examples) for name, examples in evaluation.items()}
    report = DataReport(datasets=tuple(reports), num_train=0, num_evaluation=num_evaluation)
    return PreparedData(train=as_read(stream.sample, data, view), evaluation=evaluation, report=report, stream=stream)


def _spread(wanted: int, num_sets: int) -> tuple[int, ...]:
    """A number of rows, as evenly as possible over the data sets."""
    return tuple(wanted // num_sets + (place < wanted % num_sets) for place in range(num_sets))
