from __future__ import annotations

import socket
import subprocess
import sys

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
