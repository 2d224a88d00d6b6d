"""The switch that keeps every library off the network."""

from __future__ import annotations

import os


def go_offline() -> None:
    """Makes the hub and data-set libraries use local files only; call it before they are imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
