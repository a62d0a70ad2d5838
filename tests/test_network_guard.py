"""The suite itself cannot leave the machine."""

from __future__ import annotations

import os
import socket
import urllib.request

import pytest

from tests.conftest import NetworkForbidden


def test_outside_is_forbidden() -> None:
    with pytest.raises(NetworkForbidden):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(NetworkForbidden):
        urllib.request.urlopen("http://example.invalid/", timeout=1)
    with socket.socket() as probe, pytest.raises(NetworkForbidden):
        probe.connect_ex(("192.0.2.1", 80))


def test_loopback_works() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_the_hub_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
