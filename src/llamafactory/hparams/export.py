"""Options of `export`: merge adapters, cast, split into files, prove the result."""

from __future__ import annotations

from typing import Literal

from llamafactory.hparams.section import Section, option

_GROUP = "Export"


class ExportConfig(Section):
    """Where the merged model goes and how it is written."""

    export_dir: str | None = option(None, "Folder for the merged model.", group=_GROUP)
    export_size: int = option(5, "Largest weight file, in GB.", group=_GROUP, ge=1)
    export_device: Literal["cpu", "auto"] = option("cpu", "Where the adapter is merged.", group=_GROUP)
    export_max_logit_gap: float | None = option(
        None,
        "Largest difference allowed between the logits of the adapter and of the merged model; null takes a limit "
        "that fits the type of the weights.",
        group=_GROUP,
        ge=0,
    )
