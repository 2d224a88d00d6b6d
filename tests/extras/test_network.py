from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from llamafactory.extras.network import send_no_telemetry

OFFLINE = """
import socket, sys
from llamafactory import load_config
sys.addaudithook(lambda event, arguments: event == "socket.__new__" and sys.exit("a socket"))
config = load_config({"model_name_or_path": "a/b", "offline": True}, command="chat")
from urllib3.util import connection
from huggingface_hub import is_offline_mode
print(socket.has_ipv6, connection.HAS_IPV6, is_offline_mode())
"""


def test_a_configuration_that_is_offline_takes_the_process_off_the_network() -> None:
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[1:] == ["False", "True"]
    assert done.stdout.split()[0] == str(socket.has_ipv6)


def test_no_telemetry_is_sent_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    send_no_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    send_no_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
