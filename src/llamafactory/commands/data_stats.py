"""`data stats`: rows, tokens, lengths, duplicates and the mix of data sets, counted on what training gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory.commands.data_inputs import load_inputs, print_json, split_words

if TYPE_CHECKING:
    from llamafactory.data.statistics import DatasetStatistics

_BAR_WIDTH = 50


def main(argv: list[str]) -> int:
    """Count what the data sets of a configuration give to training.

    Raises:
        LlamaFactoryError: the configuration, the data or the tokenizer cannot be used.
    """
    words, own = split_words("stats", argv)
    inputs = load_inputs(words)
    from llamafactory.data.data_report import mix_lines
    from llamafactory.data.statistics import epoch_mix, measure_dataset, mix_shares

    found = [
        (
            use,
            measure_dataset(spec, inputs.data, inputs.template, inputs.tokenizer, seed=inputs.seed, view=inputs.view),
        )
        for use, spec in inputs.datasets
    ]
    trained = [part for use, part in found if use == "train"]
    mix = [{"dataset": part.name} | shares for part, shares in zip(trained, mix_shares(trained), strict=True)]
    epoch = epoch_mix([part for use, part in found if use == "train"], inputs.data, inputs.seed)
    if "json" in own:
        datasets = [{"use": use} | as_record(part) for use, part in found]
        print_json({"cutoff_len": inputs.data.cutoff_len, "datasets": datasets, "mix": mix, "epoch": epoch})
        return 0
    for use, part in found:
        print("\n".join(render(part, use, inputs.data.cutoff_len, inputs.data.overlong)))
    if len(mix) > 1:
        print("\n".join(render_mix(mix)))
    if epoch:
        print("\n".join(["", f"an epoch ({inputs.data.mix_strategy})", *mix_lines(epoch)]))
    return 0


def as_record(part: DatasetStatistics) -> dict[str, Any]:
    """The numbers of one data set with stable keys."""
    from llamafactory.data.statistics import length_histogram, length_summary, value_summary

    return {
        "name": part.name,
        "num_rows": part.num_rows,
        "num_kept": part.num_kept,
        "dropped": part.dropped,
        "num_examples": part.num_examples,
        "num_tokens": part.num_tokens,
        "num_supervised_tokens": part.num_supervised_tokens,
        "supervised_share": round(part.supervised_share, 6),
        "num_over_cutoff": part.num_over_cutoff,
        "num_cut_tokens": part.num_cut_tokens,
        "num_duplicates": part.num_duplicates,
        "lengths": length_summary(part.lengths),
        "scores": value_summary(part.values) or None,
        "histogram": [one._asdict() for one in length_histogram(part.lengths)],
    }


def render(part: DatasetStatistics, use: str, cutoff_len: int, overlong: str) -> Iterator[str]:
    """The numbers of one data set for people."""
    from llamafactory.data.statistics import length_histogram, length_summary, value_summary

    yield f"{part.name} ({use})"
    yield f"  rows         {part.num_rows:,}, {part.num_kept:,} of them used"
    for reason, count in part.dropped.items():
        yield f"  dropped      {count:,}: {reason}"
    yield f"  examples     {part.num_examples:,}"
    share = f"{100 * part.supervised_share:.1f} %"
    yield f"  tokens       {part.num_tokens:,}, {part.num_supervised_tokens:,} of them supervised ({share})"
    yield (
        f"  over cutoff  {part.num_over_cutoff:,} rows are longer than {cutoff_len:,} tokens (overlong: {overlong}); "
        f"{part.num_cut_tokens:,} tokens cut"
    )
    yield f"  duplicates   {part.num_duplicates:,} examples repeat an earlier one"
    if summary := length_summary(part.lengths):
        yield "  length       " + ", ".join(f"{name} {number:,g}" for name, number in summary.items())
    if summary := value_summary(part.values):
        yield "  scores       " + ", ".join(f"{name} {number:,g}" for name, number in summary.items())
    bins = length_histogram(part.lengths)
    highest = max((one.num_sequences for one in bins), default=0)
    for one in bins:
        width = -(-one.num_sequences * _BAR_WIDTH // highest)
        mark = " cutoff_len" if one.first <= cutoff_len < one.last else ""
        yield f"  {one.first:>7,} to {one.last:>7,} |{'█' * width}{' ' if width else ''}{one.num_sequences:,}{mark}"
    yield ""


def render_mix(mix: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each training data set has of the whole."""
    width = max(len(one["dataset"]) for one in mix)
    yield f"{'mix':<{width}}  examples    tokens  supervised tokens"
    for one in mix:
        shares = (f"{100 * one[key]:.1f} %" for key in ("examples", "tokens", "supervised_tokens"))
        yield "{:<{width}}  {:>8}  {:>8}  {:>17}".format(one["dataset"], *shares, width=width)
