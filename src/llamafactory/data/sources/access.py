"""Configuration -> how data sets are reached."""

from __future__ import annotations

from llamafactory.data.types import SourceAccess
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.model import ModelConfig


def access_of(data: DataConfig, model: ModelConfig) -> SourceAccess:
    """Folders and tokens of a run; models and data sets share them."""
    return SourceAccess(
        cache_dir=model.cache_dir,
        media_dir=data.media_dir,
        hf_token=model.hf_hub_token,
        ms_token=model.ms_hub_token,
        om_token=model.om_hub_token,
        is_offline=model.offline,
    )
