"""What a fresh process looks like after ``prepare_process``: asked of real processes, because it changes all of one."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from comoe.train.environment import available_cores, describe_environment, interface_towards

ROOT = Path(__file__).parents[3]
ASKED = """
import json, logging, os, sys, warnings, torch
from comoe.train.environment import prepare_process
prepare_process(verbose=sys.argv[1] == "verbose")
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS")
answer = {name: os.environ.get(name) for name in names}
answer["threads"] = torch.get_num_threads()
answer["level"] = logging.getLogger("DeepSpeed").level
answer["deepspeed"] = "deepspeed" in sys.modules
print(json.dumps(answer))
"""


def prepared(*, verbose: bool = False, **given: str) -> dict[str, Any]:
    """What the process found, started without any variable that a user need not set."""
    ours = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "OMP_", "MKL_", "DS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    command = [sys.executable, "-c", ASKED, "verbose" if verbose else "quiet"]
    environment |= {"PYTHONPATH": str(ROOT), **given}
    return json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    )


def test_plain_python_becomes_a_world_of_one_rank_without_any_variable():
    answer = prepared()
    assert (answer["RANK"], answer["LOCAL_RANK"], answer["WORLD_SIZE"]) == ("0", "0", "1")
    assert answer["threads"] == available_cores()
    assert answer["level"] == logging.ERROR
    assert not answer["deepspeed"], (
        "DeepSpeed reads the environment when it is imported, so it must come later"
    )
    with socket.socket() as probe:
        probe.bind((answer["MASTER_ADDR"], int(answer["MASTER_PORT"])))  # the port is a free one


def test_a_rank_of_a_launcher_keeps_its_place_and_takes_its_share_of_the_cores():
    cores = available_cores()
    places = {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": str(cores), "WORLD_SIZE": "8", "MASTER_ADDR": "host",
              "MASTER_PORT": "1234"}  # fmt: skip
    answer = prepared(verbose=True, **places)
    assert {key: answer[key] for key in places if key != "LOCAL_SIZE"} | {
        "LOCAL_SIZE": str(cores)
    } == places
    assert answer["threads"] == 1
    assert answer["level"] == logging.NOTSET


def test_threads_and_accelerator_that_the_user_chose_stay():
    answer = prepared(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    assert (answer["OMP_NUM_THREADS"], answer["threads"], answer["DS_ACCELERATOR"]) == (
        "1",
        1,
        "cpu",
    )


def test_the_description_of_the_environment_is_plain_json_with_versions_and_command():
    described = json.loads(json.dumps(describe_environment(world_size=3)))
    assert described["world_size"] == 3
    assert described["command"] == sys.argv
    assert described["packages"]["deepspeed"] == "0.19.8"
    assert set(described["packages"]) >= {"comoe", "torch", "transformers", "datasets"}


def test_the_interface_towards_an_address_is_the_one_that_has_a_route_to_it():
    assert psutil.net_if_addrs()[interface_towards("127.0.0.1")]
    assert any(
        card.address == "127.0.0.1"
        for card in psutil.net_if_addrs()[interface_towards("127.0.0.1")]
    )
    assert interface_towards("no-such-machine.invalid") == ""
