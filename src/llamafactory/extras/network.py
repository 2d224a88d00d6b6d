"""The switches that keep libraries off the network, and from telling about this machine."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from importlib.util import find_spec


def send_no_telemetry() -> None:
    """Keeps the hub's client from asking and telling who uses it, unless HF_HUB_DISABLE_TELEMETRY says otherwise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def go_offline() -> None:
    """Makes the hub and data-set libraries use local files only; call it before they are imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    send_no_telemetry()
    _import_urllib3_without_socket()


def _import_urllib3_without_socket() -> None:
    """While it is imported, urllib3 binds a socket to learn whether there is IPv6, unless Python itself has none.

    Nothing here uses urllib3, but libraries import it (accelerate through boto3). Imported this way it would ask for
    IPv4 addresses only, and offline nobody asks for any.
    """
    if find_spec("urllib3") is None:
        return
    has_ipv6 = socket.has_ipv6
    socket.has_ipv6 = False
    try:
        import_module("urllib3.util.connection")
    finally:
        socket.has_ipv6 = has_ipv6
