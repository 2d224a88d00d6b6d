"""`train --rerun run.json`: the options of a recorded run as the words of a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamafactory.compose import all_sections
from llamafactory.extras import log
from llamafactory.extras.secrets import MASK
from llamafactory.hparams.section import default_of
from llamafactory.train.rerun import read_record

_FLAG = "--rerun"
_NOT_TAKEN = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_change", "rerun_of"}


def expand_rerun(argv: Sequence[str]) -> list[str]:
    """Replaces `--rerun run.json` by the options of that run; the words beside it win over them.

    The new run goes into `<old folder>-rerun` where no `output_dir` is given.

    Raises:
        ConfigError: the file is no record of a run.
    """
    words = list(argv)
    place = next((at for at, word in enumerate(words) if word == _FLAG or word.startswith(f"{_FLAG}=")), None)
    if place is None:
        return words
    path = Path(words[place].partition("=")[2] if "=" in words[place] else "".join(words[place + 1 : place + 2]))
    rest = words[:place] + words[place + (1 if "=" in words[place] else 2) :]
    record = read_record(path)
    config = dict(record["config"])
    given = record.get("given") or ()
    options = {
        key: value
        for key, value in config.items()
        if key not in _NOT_TAKEN and (key in given or _says_something(key, value))
    }
    options |= {key: content for key, content in (record.get("files") or {}).items() if key in options}
    options |= {"rerun_of": str(path), "output_dir": f"{Path(str(config.get('output_dir')))}-rerun"}
    masked = [key for key, value in options.items() if MASK in json.dumps(value)]
    if masked:
        log.note(f"secrets are not recorded: {', '.join(masked)} must be given again where they are needed")
    return [*(f"{key}={_text(value)}" for key, value in options.items() if key not in masked), *rest]


def _says_something(key: str, value: Any) -> bool:
    for section in all_sections().values():
        if key in section.model_fields:
            return value != json.loads(json.dumps(default_of(section.model_fields[key])))
    return value is not None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
