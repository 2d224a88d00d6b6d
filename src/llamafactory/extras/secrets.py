"""Keep secrets out of everything that is printed or written: which keys hold them, what they look like."""

from __future__ import annotations

import re

MASK = "********"

_KEY = re.compile(r"(?:^|_)(?:token|api_?key|secret|password|passwd|webhook_url)$", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_TOKEN = re.compile(r"(?:hf_|ghp_|github_pat_)[A-Za-z0-9_]{16,}|\b(?:sk|xox[abp])-[A-Za-z0-9_-]{20,}")


def is_secret_key(key: str) -> bool:
    """Whether the value of a key with this name is a secret: `hf_hub_token`, `swanlab_api_key`, ..."""
    return _KEY.search(key.replace("-", "_")) is not None


def mask_text(text: str) -> str:
    """The text with access tokens and the user part of URLs replaced."""
    return _TOKEN.sub(MASK, _URL_USER.sub(MASK, text))
