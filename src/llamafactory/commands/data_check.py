"""`data check`: everything that is wrong with the rows, each problem with its place and its fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from llamafactory.commands.data_inputs import load_inputs, print_json, split_words

if TYPE_CHECKING:
    from llamafactory.data.problems import CheckedDataset


def main(argv: list[str]) -> int:
    """Check every row of every data set.

    Returns:
        0 where nothing is wrong, 1 where something is.

    Raises:
        LlamaFactoryError: the configuration or the tokenizer cannot be used.
    """
    words, own = split_words("check", argv)
    inputs = load_inputs(words)
    from llamafactory.data.problems import check_dataset

    checked: list[CheckedDataset] = []
    for _, spec in inputs.datasets:
        checked.append(
            check_dataset(spec, inputs.data, inputs.template, inputs.tokenizer, seed=inputs.seed, view=inputs.view)
        )
        if "json" not in own:
            print("\n".join(render(checked[-1])))
    is_ok = not any(one.problems for one in checked)
    if "json" in own:
        uses = [use for use, _ in inputs.datasets]
        records = [{"use": use} | asdict(one) for use, one in zip(uses, checked, strict=True)]
        print_json({"ok": is_ok, "datasets": records})
    return 0 if is_ok else 1


def render(checked: CheckedDataset) -> Iterator[str]:
    """The problems of one data set, and a line that sums up."""
    for problem in checked.problems:
        yield problem.render()
    count = len(checked.problems)
    text = f"{count:,} problem{'' if count == 1 else 's'}" if count else "no problems"
    text = f"{checked.name}: {text}, {checked.num_usable:,} of {checked.num_rows:,} rows can be used"
    if count:
        text += "; training would stop" if checked.stops_training else "; training would drop the others"
    yield text
