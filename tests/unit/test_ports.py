"""Free ports: different ones for processes that look for them at the same time."""

import json
import socket
import subprocess
import sys

from bundle.server.ports import PORTS, free_ports, is_free

FIND = "import json; from bundle.server.ports import free_ports; print(json.dumps(free_ports(50)))"


def test_free_ports_are_different_and_not_of_outgoing_connections():
    ports = free_ports(300)
    assert len({*ports}) == 300
    assert {*ports} <= {*PORTS}


def test_port_that_is_listened_on_is_not_free():
    with socket.socket() as listener:
        [port] = free_ports(1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert not is_free(port)


def test_processes_that_look_at_the_same_time_find_different_ports():
    started = [subprocess.Popen([sys.executable, "-c", FIND], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [port for process in started for port in json.loads(process.communicate()[0])]
    assert len({*found}) == len(found)
