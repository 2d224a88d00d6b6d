"""RunConfig: everything that the user wants of one run, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from llamafactory.extras.secrets import MASK, is_secret_key, mask_text
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.export import ExportConfig
from llamafactory.hparams.generation import GenerationConfig
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.section import Section
from llamafactory.hparams.train import TrainConfig

SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "generation": GenerationConfig,
    "export": ExportConfig,
}
"""The sections that every run has; a stage and an adapter bring one each besides."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one run shall do. Made by `compose.load_config`; nothing changes it afterwards."""

    command: str = "train"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    stage_options: Section = field(default_factory=Section)
    adapter_options: Section = field(default_factory=Section)

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Name and content of every section."""
        for name in (*SECTIONS, "stage_options", "adapter_options"):
            yield name, getattr(self, name)

    def given_keys(self) -> list[str]:
        """The keys that were set, also where they were set to their default, in order."""
        return sorted(key for _, section in self.sections() for key in section.model_fields_set)

    def flat(self, *, mask_secrets: bool = False) -> dict[str, Any]:
        """All options in one JSON-able mapping, as a user would write them."""
        found: dict[str, Any] = {}
        for _, section in self.sections():
            found.update(section.model_dump(mode="json"))
        return {key: mask_value(key, value) for key, value in found.items()} if mask_secrets else found


def mask_value(key: str, value: Any) -> Any:
    """The value of a key as it may be shown: secrets and the passwords inside of URLs are replaced."""
    if value is not None and value != "" and is_secret_key(key):
        return MASK
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        return {name: mask_value(str(name), part) for name, part in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [mask_value(key, part) for part in cast("list[Any]", value)]
    return value
