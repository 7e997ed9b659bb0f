"""Without an address of the hub its libraries must not ask again and again."""

import socket
import time

import datasets
import pytest
from helpers_hub import served
from huggingface_hub import constants

from comoe.config.hub_access import cached_where_unreachable, why_unreachable
from comoe.data.reading.tables import load_hub


@pytest.fixture
def asked(monkeypatch):
    """Hosts that were looked up; none has an address."""
    hosts = []

    def look_up(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return hosts


def test_a_data_set_of_the_hub_is_refused_at_once_without_a_network(asked):
    began = time.process_time()
    with pytest.raises(ValueError, match="--input .nobody/nothing.*Without a network, save it"):
        load_hub("--input", "nobody/nothing", streaming=True)
    # One look-up of ours; the library would ask for minutes.
    assert asked == ["hub.invalid"] and time.process_time() - began < 10
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_folder_and_a_proxy_ask_nobody(asked, tmp_path, monkeypatch):
    with cached_where_unreachable(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with cached_where_unreachable("nobody/nothing"):
        assert not constants.HF_HUB_OFFLINE
    assert asked == []


def test_a_hub_that_answers_is_told_from_one_that_does_not(asked, monkeypatch):
    assert why_unreachable() == "[Errno -2] Name or service not known" and asked == ["hub.invalid"]
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with served("secret") as (_, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert why_unreachable() == ""
    assert "refused" in why_unreachable(seconds=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_unreachable() == "HF_HUB_OFFLINE is set"
