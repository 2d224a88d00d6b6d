"""The sub-commands of `data`: their usage, their own words, their help."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH = 110
_PROGRAM = "llamafactory-cli data"
_JSON = ("--json", "print JSON for a program")
_CONFIG = (
    "CONFIG is the file that you train with; key=value words win over it. The keys model_name_or_path, template and "
    "dataset (or eval_dataset) decide what is read; nothing is trained and nothing is written. Tokenizer, template, "
    "masks and truncation are those of training."
)


class SubCommand(NamedTuple):
    """One sub-command. Each of `own_words` is a flag, or a flag and its value, with a line of help."""

    usage: str
    summary: str
    text: str
    own_words: tuple[tuple[str, str], ...]


SUB_COMMANDS: dict[str, SubCommand] = {
    "preview": SubCommand(
        "preview CONFIG [key=value ...] [--rows N] [--ids]",
        "show rows as they will be trained",
        "Supervised text is coloured on a terminal (or with FORCE_COLOR=1), and stands between ⟦ and ⟧ elsewhere. "
        f"[-N-] says that truncation took N tokens out there. {_CONFIG}",
        (
            ("--rows N", "rows of each data set to show (default 3)"),
            ("--ids", "one line for each token: position, id, supervised or not, text"),
            _JSON,
        ),
    ),
    "check": SubCommand(
        "check CONFIG [key=value ...]",
        "find everything that is wrong with the rows",
        "Reads, renders and tokenises every row. Each problem is shown with file, line, field, what was found, what "
        "is expected and how to mend it; of a row with several faults the first. Exit code 1 if there is any problem, "
        f"0 if there is none. {_CONFIG}",
        (_JSON,),
    ),
    "stats": SubCommand(
        "stats CONFIG [key=value ...]",
        "count rows, tokens, lengths, duplicates",
        "Rows that are used and dropped, supervised share, lengths before truncation, rows over cutoff_len and the "
        f"tokens that it cuts, examples that repeat an earlier one, the mix of data sets. {_CONFIG}",
        (_JSON,),
    ),
    "cache": SubCommand(
        "cache [list | prune --unused-days N | prune --max-gb N] [CONFIG | cache_dir=PATH | --folder PATH]",
        "list the tokenised rows that are kept, remove old ones",
        "Training keeps tokenised rows and finds them again by their content. list (the default) shows each data set "
        "with its size and when a run used it last; prune removes those unused for longest, until what is left "
        "keeps the limits. What a run is writing to stays; what is removed is tokenised again when it is needed. "
        "With CONFIG (or cache_dir=PATH, tokenized_path=PATH) the folder is the one that a run of it uses.",
        (
            ("--unused-days N", "prune: those that no run used for N days go"),
            ("--max-gb N", "prune: what is left takes at most N GB"),
            ("--folder PATH", "the cache folder; without it: this user's, where training looks"),
            ("--dry-run", "prune: say what would go, and remove nothing"),
            _JSON,
        ),
    ),
    "render": SubCommand(
        "render --template NAME FILE.jsonl [--tokenizer PATH]",
        "write conversations as a template does",
        'Each line of FILE.jsonl is {"messages": [...]} in OpenAI form, perhaps with "tools" and "enable_thinking". '
        'For each one line is printed: a JSON list of {"text", "trainable"}. A conversation of which each answer '
        "becomes a sequence of its own is shown as its last sequence, with a note; --json has all of them. "
        "An end token that training adds behind the last answer is not shown: it is not the template's (see preview). "
        "Exit code 1 if a line cannot be used.",
        (
            ("--template NAME", "name of a template; auto (the tokenizer's own) needs --tokenizer"),
            ("--tokenizer PATH", "folder or hub id with the begin and end tokens; without it: <BOS> and <EOS>"),
            ("--json", 'print {"file", "line", "sequences"}: all sequences of each conversation'),
        ),
    ),
}


def render_help(words: Sequence[str]) -> str:
    """The help of `data`, or of the sub-command that is named first."""
    name = next((word for word in words if word in SUB_COMMANDS), None)
    if name is None:
        rows = (f"  {name:<9}{command.summary}" for name, command in SUB_COMMANDS.items())
        usages = (f"  {_PROGRAM} {command.usage}" for command in SUB_COMMANDS.values())
        summary = "look at rows as they will be trained, check them, count them"
        more = f"{_PROGRAM} NAME --help      shows the words of a sub-command"
        return "\n".join([f"{_PROGRAM}: {summary}", "", *rows, "", "usage:", *usages, "", more])
    command = SUB_COMMANDS[name]
    lines = [f"{_PROGRAM} {name}: {command.summary}", "", f"usage: {_PROGRAM} {command.usage}", ""]
    lines += [f"  {word:<18}{text}" for word, text in command.own_words]
    return "\n".join([*lines, "", *textwrap.wrap(command.text, _WIDTH)])
