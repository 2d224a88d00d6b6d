"""The records that data passes through: row -> Conversation -> Turn -> Segment -> Example.

Pure data: nothing here imports torch, transformers or datasets, reads a file, or knows a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
TrainOn: TypeAlias = Literal["all", "last", "tool_calls"]
RewrittenHistory: TypeAlias = Literal["split", "last"]
ViewName: TypeAlias = Literal["sft", "pairs", "feedback", "text", "prompts", "answers", "ranked", "labelled"]
"""How a stage reads rows, see `views`."""
MediaKind: TypeAlias = Literal["image", "video", "audio"]
IGNORE_INDEX = -100
"""Label of a position that is not supervised (the value that torch's cross-entropy ignores)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of a function. `arguments` is a JSON text, as in OpenAI's protocol."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation.

    An assistant message may hold text, tool calls, or both (text first). `train` None means "as the
    masking options say".
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    train: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """An image, a video or an audio that a row brings.

    Attributes:
        column: where in the row, such as `images[0]`.
        files: its path or URL; several where a video is given as frames; none where the row holds the bytes.
        content: the bytes, or the object that `datasets` made of them.
    """

    kind: MediaKind
    column: str
    files: tuple[str, ...] = ()
    content: object = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A dialogue in the canonical (OpenAI-like) form, whatever format its row had.

    At most one system message, first. `tools` are JSON-schema function descriptions; None where the row does not speak
    of tools, empty where it says that there are none (named templates then write a system block, if an empty one).
    `origin` names the row for messages to people: `file.json:12` or `dataset#12`. `media` are in the order of their
    placeholders (`<image>`, `<video>`, `<audio>`) in the texts, each kind by itself.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] | None = None
    origin: str = ""
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Two answers to one prompt, the first preferred; `margin` says by how much, where somebody said so."""

    prompt: Conversation
    chosen: Message
    rejected: Message
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """A conversation whose last answer a person liked or did not like."""

    conversation: Conversation
    is_desirable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A conversation whose last answer has a score."""

    conversation: Conversation
    score: float


class Piece(NamedTuple):
    """A piece of text before anybody asked whether it is supervised.

    `is_literal` marks text that came from a row: special-token strings inside it are plain text.
    """

    text: str
    is_literal: bool = False


class Segment(NamedTuple):
    """A piece of rendered text that is supervised as a whole or not at all.

    `is_literal` marks text that came from a row: special-token strings inside it are plain text. A template may leave
    row text unmarked that holds no such string.
    """

    text: str
    trainable: bool
    weight: float = 1.0
    is_literal: bool = False


class Turn(NamedTuple):
    """What the model sees before an answer, and the answer with its stop.

    `message_index` says which message of the conversation is the answer. Segments at the end of `answer` that are not
    trainable are what the template writes after the stop of the last answer.
    """

    prompt: tuple[Segment, ...]
    answer: tuple[Segment, ...]
    message_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Token ids and labels of one training sequence.

    Attributes:
        input_ids: int32 `[time]`.
        labels: int32 `[time]`; `IGNORE_INDEX` where not supervised, else equal to `input_ids` (not shifted).
        weights: float32 `[time]` loss weight of each label, or None when all are 1.
        num_cut: tokens that truncation removed.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None
    num_cut: int = 0

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Supervised tokens that can be predicted, that is, all but a supervised first token."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """Which turns of a conversation carry loss.

    Attributes:
        train_on: all answers, the last one, or those that call tools; marks of single messages beat it.
        train_on_prompt: prompts carry loss too.
        rewritten_history: where one rendering is not what inference sees for every answer: `split` makes a sequence of
            each answer, `last` keeps only the last one of them.
    """

    train_on: TrainOn = "all"
    train_on_prompt: bool = False
    rewritten_history: RewrittenHistory = "split"

    @property
    def is_last_only(self) -> bool:
        """Whether only the last answer of a conversation is trained."""
        return self.train_on == "last"


class Template(Protocol):
    """Renders conversations as a model reads them; one object serves training, chat and evaluation."""

    @property
    def name(self) -> str:
        """The name shown to people."""
        ...

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Texts that end an answer, besides the tokenizer's own end token."""
        ...

    @property
    def is_tokenized_whole(self) -> bool:
        """Whether token ids are those of the whole text (a tokenizer's own template), not of each turn's parts."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """All that decides what it writes, beside this program's code, as JSON-able values."""
        ...

    def render(self, conversation: Conversation) -> Sequence[tuple[Turn, ...]]:
        """Turns of a whole dialogue.

        Returns one sequence of turns where a single rendering is what inference sees for every answer, else one
        sequence for each answer.
        """
        ...

    def render_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The text before the next answer: history and generation prompt, nothing trainable."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceAccess:
    """How data sets are reached. Tokens are never shown.

    Attributes:
        cache_dir: where hubs put what they download, None: their own places.
        media_dir: where the paths in rows begin, None: in the folder of `dataset_info.json`.
        is_streaming: rows of a hub come over the network as they are read.
        is_offline: only what is on this machine already.
    """

    cache_dir: str | None = None
    media_dir: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    ms_token: str | None = field(default=None, repr=False)
    om_token: str | None = field(default=None, repr=False)
    is_streaming: bool = False
    is_offline: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One entry of `dataset_info.json`, with its defaults filled in.

    Attributes:
        location: path, hub id or address, as `source` says.
        needs_answer: False where only prompts are used: the last answer of a row may be empty.
        media_dir: folder in which the paths of images, videos and audios in rows begin; None: rows hold whole paths.
        access: tokens and folders for the source; no part of what the data set is.
    """

    name: str
    source: Literal["file", "cloud", "hub", "modelscope", "openmind"]
    location: str
    formatting: str = "alpaca"
    is_ranking: bool = False
    needs_answer: bool = True
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    tags: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    media_dir: str | None = None
    access: SourceAccess = field(default=SourceAccess(), compare=False, repr=False)
