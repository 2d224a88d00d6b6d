"""How a stage reads rows: a record -> sequences of turns -> the examples of one row, kept together as a *group*.

A view is a record of functions. `render` writes the text of a row, `cut` decides what is kept of it; between the two,
token ids are made for many rows at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llamafactory.data.encode import Cut, EncodedTurn, join_history, kept_lengths, share_budget
from llamafactory.data.formats import Record
from llamafactory.data.render import render_turns
from llamafactory.data.row_error import RowError
from llamafactory.data.table import NO_FLAG, NO_VALUE
from llamafactory.data.types import (
    Conversation,
    DatasetSpec,
    Feedback,
    MaskOptions,
    Preference,
    Scored,
    Segment,
    Template,
    Turn,
    ViewName,
)
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note

_KINDS = {
    "conversations": "conversations whose answers are all good",
    "pairs": "preference pairs (ranking: true)",
    "feedback": "judged answers (a kto_tag column)",
    "scores": "scored answers (a score column)",
    "text": "plain text (no column of answers)",
}
_LAST_ANSWER = MaskOptions(train_on="last")
"""The mask of views in which one answer is compared or judged."""
_STAGES = {"conversations": "sft, ppo, grpo", "pairs": "rm, dpo", "feedback": "kto", "scores": "rm", "text": "pt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What decides, besides the view, how a row becomes examples.

    Attributes:
        template: writes conversations.
        mask: which answers carry loss; views of a single answer train that one alone.
        cutoff_len: tokens of the longest example.
        end_token: what ends a document of plain text.
        joins_text: documents are joined and cut into blocks later, so that none is cut here.
    """

    template: Template
    mask: MaskOptions
    cutoff_len: int
    end_token: str = ""
    joins_text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One way to read rows.

    Attributes:
        name: as a stage names it.
        kinds: kinds of data that it can read, see `kind_of`.
        render: the sequences of a row; none where no answer carries loss. May count things of the row.
        cut: sequences with ids -> examples, with what is kept of them.
        flag: what is said about the answer of a row.
        numbers: the columns of numbers about answers that it reads; others are left alone, see `fit_spec`.
        needs_answer: False where only prompts are used, and a row's last answer may be empty.
        value: the number that a row brings: the score of its answer, or the margin of its pair.
        is_whole: the examples of a row are used together or not at all, and make up one item of a batch.
        is_supervised: an example without a supervised token is of no use.
    """

    name: ViewName
    kinds: tuple[str, ...]
    render: Callable[[Record, Reading, dict[str, int]], Sequence[Sequence[Turn]]]
    cut: Callable[[Sequence[Sequence[EncodedTurn]], Reading], list[Cut]]
    flag: Callable[[Record], int] = lambda record: NO_FLAG
    numbers: tuple[str, ...] = ()
    needs_answer: bool = True
    value: Callable[[Record], float] = lambda record: NO_VALUE
    is_whole: bool = True
    is_supervised: bool = True


def find_view(name: ViewName) -> View:
    """The view of that name."""
    return _VIEWS[name]


def kind_of(spec: DatasetSpec) -> str:
    """What a data set holds, as its entry says: `pairs`, `feedback`, `scores`, `text` or `conversations`."""
    if spec.is_ranking:
        return "pairs"
    if spec.columns.get("score"):
        return "scores"
    if spec.columns.get("kto_tag"):
        return "feedback"
    return "text" if spec.formatting == "alpaca" and not spec.columns.get("response") else "conversations"


def fit_spec(spec: DatasetSpec, view: View) -> DatasetSpec:
    """The data set as the view reads it: without columns that judge answers in a way the view has no use for.

    Says once which columns these are.

    Raises:
        DataError: data for another stage.
    """
    unused = {key for key in ("score", "margin") if spec.columns.get(key) and key not in view.numbers}
    if "score" in view.numbers and spec.columns.get("score") and spec.columns.get("kto_tag"):
        unused.add("kto_tag")
    if unused:
        names = " and ".join(f"'{spec.columns[key]}' ({key})" for key in sorted(unused))
        note(f"{spec.name}: the column {names} is not used by this stage", once=True)
        spec = replace(spec, columns={key: name for key, name in spec.columns.items() if key not in unused})
    kind = kind_of(spec)
    if kind in view.kinds:
        return spec if view.needs_answer else replace(spec, needs_answer=False)
    fix = f"such data is for the stages: {_STAGES[kind]}"
    if kind == "text":
        fix += "; or name the column of answers: columns: {response: ...}"
    raise DataError(
        "the data set does not fit the stage",
        where=spec.name,
        found=_KINDS[kind],
        expected=" or ".join(_KINDS[one] for one in view.kinds),
        fix=fix,
    )


def _render_dialogue(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    return render_turns(_of(record, Conversation), reading.template, reading.mask, counts=counts)


def _cut_dialogue(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    keep_last = reading.mask.is_last_only
    return [Cut(turns, kept_lengths(turns, reading.cutoff_len, keep_last=keep_last)) for turns in sequences]


def _render_pair(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    pair = _of(record, Preference)
    sides = [
        _render_last(replace(pair.prompt, messages=(*pair.prompt.messages, answer)), reading)
        for answer in (pair.chosen, pair.rejected)
    ]
    return [side[0] for side in sides] if all(sides) else []


def _cut_pair(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    """Both answers behind the same prompt: the longer answer decides how the budget is shared."""
    joined = [join_history(turns) for turns in sequences]
    if len(joined) != 2:
        return []
    prompts = zip(*(one.prompt_ids for one in joined), strict=False)
    num_same = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], prompts))
    sides = [_with_prompt_of(turn, num_same) for turn in joined]
    longest = max(len(side.answer_ids) for side in sides)
    num_prompt, num_answer = share_budget(num_same, longest, reading.cutoff_len)
    return [Cut([side], [(num_prompt, min(num_answer, len(side.answer_ids)))]) for side in sides]


def _with_prompt_of(turn: EncodedTurn, num_prompt: int) -> EncodedTurn:
    """The turn with a prompt of that many tokens; what is behind goes to the answer, without loss."""
    return EncodedTurn(
        prompt_ids=turn.prompt_ids[:num_prompt],
        prompt_weights=turn.prompt_weights[:num_prompt],
        answer_ids=turn.prompt_ids[num_prompt:] + turn.answer_ids,
        answer_weights=turn.prompt_weights[num_prompt:] + turn.answer_weights,
    )


def _render_judged(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    return _render_last(_of(record, Feedback).conversation, reading)


def _cut_judged(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    joined = [join_history(turns) for turns in sequences]
    return [Cut([turn], kept_lengths([turn], reading.cutoff_len)) for turn in joined]


def _render_answer(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    conversation = record.conversation if isinstance(record, Feedback | Scored) else _of(record, Conversation)
    return _render_last(conversation, reading)


def _render_ranked(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    if isinstance(record, Preference):
        return _render_pair(record, reading, counts)
    return _render_last(_of(record, Scored).conversation, reading)


def _cut_ranked(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    return _cut_pair(sequences, reading) if len(sequences) == 2 else _cut_judged(sequences, reading)


def _number_of(record: Record) -> float:
    return record.margin if isinstance(record, Preference) else _of(record, Scored).score


def _is_liked(record: Record) -> int:
    return int(_of(record, Feedback).is_desirable)


def _render_last(conversation: Conversation, reading: Reading) -> Sequence[Sequence[Turn]]:
    """The sequence that ends with the last answer; none where that answer carries no loss."""
    sequences = render_turns(conversation, reading.template, _LAST_ANSWER)
    return [turns for turns in sequences if turns[-1].message_index == len(conversation.messages) - 1][-1:]


def _render_text(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    messages = _of(record, Conversation).messages
    if [message.role for message in messages] != ["user"]:
        raise RowError(
            "not plain text",
            field="row",
            found=f"{len(messages)} messages",
            expected="one text",
            fix="name only the column of the text: columns: {prompt: text}",
        )
    text = Segment(text=messages[0].content, trainable=True, is_literal=True)
    end = Segment(text=reading.end_token, trainable=True)
    return [(Turn(prompt=(), answer=(text, end) if reading.end_token else (text,), message_index=0),)]


def _cut_text(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    """A document is kept whole where blocks are cut later, else its first `cutoff_len` tokens."""
    cuts: list[Cut] = []
    for turns in sequences:
        length = len(turns[0].answer_ids)
        cuts.append(Cut(turns, [(0, length if reading.joins_text else min(length, reading.cutoff_len))]))
    return cuts


def _render_prompt(record: Record, reading: Reading, counts: dict[str, int]) -> Sequence[Sequence[Turn]]:
    """The text before the next answer, and where the row has that answer, its bare text as a second sequence."""
    conversation = _of(record, Conversation)
    messages = conversation.messages
    answer = messages[-1] if messages[-1].role == "assistant" else None
    asked = replace(conversation, messages=messages[:-1] if answer else messages)
    turns = [(Turn(prompt=reading.template.render_prompt(asked), answer=(), message_index=len(asked.messages)),)]
    if answer is not None and answer.content:
        text = Segment(text=answer.content, trainable=True, is_literal=True)
        turns.append((Turn(prompt=(), answer=(text,), message_index=len(asked.messages)),))
    return turns


def _cut_prompt(sequences: Sequence[Sequence[EncodedTurn]], reading: Reading) -> list[Cut]:
    """A prompt keeps its end, with what asks the model to answer; an answer keeps its start."""
    cuts: list[Cut] = []
    for (turn,) in sequences:
        num_over = max(len(turn.prompt_ids) - reading.cutoff_len, 0)
        head = EncodedTurn(turn.prompt_ids[:num_over], turn.prompt_weights[:num_over], array("i"), array("f"))
        tail = turn._replace(prompt_ids=turn.prompt_ids[num_over:], prompt_weights=turn.prompt_weights[num_over:])
        kept = (len(tail.prompt_ids), min(len(tail.answer_ids), reading.cutoff_len))
        cuts.append(Cut([head, tail], [(0, 0), kept]))
    return cuts


def _of(record: object, wanted: type[Any]) -> Any:
    if not isinstance(record, wanted):
        raise TypeError(f"{type(record).__name__} is not a {wanted.__name__}")
    return record


_VIEWS: dict[ViewName, View] = {
    view.name: view
    for view in (
        View(name="sft", kinds=("conversations",), render=_render_dialogue, cut=_cut_dialogue, is_whole=False),
        View(name="pairs", kinds=("pairs",), render=_render_pair, cut=_cut_pair),
        View(name="feedback", kinds=("feedback",), render=_render_judged, cut=_cut_judged, flag=_is_liked),
        View(
            name="ranked",
            kinds=("pairs", "scores"),
            render=_render_ranked,
            cut=_cut_ranked,
            numbers=("score", "margin"),
            value=_number_of,
        ),
        View(name="answers", kinds=("conversations", "feedback"), render=_render_answer, cut=_cut_judged),
        View(name="text", kinds=("text",), render=_render_text, cut=_cut_text, is_whole=False),
        View(
            name="prompts",
            kinds=("conversations", "text"),
            render=_render_prompt,
            cut=_cut_prompt,
            is_supervised=False,
            needs_answer=False,
        ),
        View(
            name="labelled",
            kinds=("conversations", "text"),
            render=_render_prompt,
            cut=_cut_prompt,
            is_supervised=False,
        ),
    )
}
