"""Look at this machine: versions, devices, compiler, ports, network, memory, disk, starter kit, and one training step.

    comoe doctor
    comoe doctor --no-step

Each line is ok, a warning, or a fault with what mends it. The exit code is 1 where there is a fault.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from comoe.commands.arguments import new_parser
from comoe.commands.guard import guarded
from comoe.config.extras import EXTRAS

OK, WARNING, FAULT = "ok", "warning", "FAULT"
Finding = tuple[str, str]
"""One of the three words, and what was found, with what mends it."""

GIB = 2**30
STEP_SECONDS = 300
"""A trial step takes some 20 s on two cores."""


def parser() -> ArgumentParser:
    """The command line."""
    found = new_parser("doctor", __doc__)
    found.add_argument(
        "--no-step", action="store_true", help="leave the training step out (20 seconds)"
    )
    return found


@guarded("doctor")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, print a line per finding."""
    given = parser().parse_args(argv)
    worst = OK
    for name, check in CHECKS.items():
        if name == "training step" and given.no_step:
            continue
        for word, text in check():
            print(f"{word:<7}  {name}: {text}", flush=True)
            worst = FAULT if FAULT in (word, worst) else worst
    sys.exit(1 if worst == FAULT else 0)


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield OK, f"Python {platform.python_version()}, {platform.platform()}"
    try:
        wishes = requires("comoe") or []
    except PackageNotFoundError:
        yield WARNING, "this checkout is not installed: pip install --editable ."
        wishes = []
    for wanted in map(Requirement, wishes):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            yield FAULT, f'{wanted.name} is missing: pip install "{wanted}"'
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            yield FAULT, f'{wanted.name} is {there}: pip install "{wanted}"'
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            yield (
                WARNING,
                f'extra {extra} lacks {", ".join(missing)}: pip install "comoe[{extra}]"',
            )
        else:
            yield OK, f"extra {extra} is installed"


def _devices() -> Iterator[Finding]:
    import torch

    from comoe.distributed import gpu_lacks_bf16

    yield (
        OK,
        f"torch {torch.__version__}, {os.cpu_count()} cores",
    )
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        word = OK if free > total / 2 else WARNING
        major, minor = torch.cuda.get_device_capability(number)
        shown = f"GPU {number}: {name}, compute capability {major}.{minor}"
        yield word, f"{shown}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if lacking := gpu_lacks_bf16():
        yield WARNING, f"{lacking}: training is in float32"
    if not torch.cuda.is_available():
        own = (
            "Apple's GPU predicts, training is on the CPU"
            if torch.backends.mps.is_available()
            else "no GPU"
        )
        yield OK, own


def _compiler() -> Iterator[Finding]:
    names = os.environ.get("CC", "cc gcc clang").split()
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        yield OK, found
    else:
        yield (
            WARNING,
            "none found, and DeepSpeed's optimizers for CPUs need one: install gcc or set CC",
        )


def _ports() -> Iterator[Finding]:
    import socket

    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(5)
            client.connect(server.getsockname())
        yield OK, "this machine reaches itself on a free port"
    except OSError as error:
        yield (
            FAULT,
            f"no connection to a port of this machine ({error}): ranks cannot meet; look at its firewall",
        )


def _network() -> Iterator[Finding]:
    import socket
    from ipaddress import ip_address

    from comoe.config.hub_access import why_unreachable

    name = socket.gethostname()
    try:
        found = dict.fromkeys(place[0] for *_, place in socket.getaddrinfo(name, 9))
        if all(ip_address(address.partition("%")[0]).is_loopback for address in found):
            yield (
                WARNING,
                f"the name {name} leads to {', '.join(found)}, which other machines do not reach: "
                "for runs on several name its address (--master_addr, MASTER_ADDR)",
            )
        else:
            yield OK, f"this machine is {name}, {', '.join(found)}"
    except OSError:
        yield (
            WARNING,
            f"the name {name} has no address: add it to /etc/hosts for runs on several machines",
        )
    if why := why_unreachable():
        yield (
            WARNING,
            f"the Hugging Face hub does not answer ({why}): name folders, fetch models and data "
            "into its cache before, or set HF_ENDPOINT to a mirror",
        )
    else:
        yield OK, "the Hugging Face hub answers"


def _memory() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        mend = "" if free > GIB else "; give a container more with --shm-size=8g"
        yield (OK if free > GIB else WARNING), f"shared memory {free / GIB:.1f} GiB free{mend}"
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield (OK if free > 2 * GIB else WARNING), f"main memory {free / GIB:.1f} GiB unused"


def _disk() -> Iterator[Finding]:
    from comoe.starter.registry import home

    for what, folder in (("the working folder", Path.cwd()), ("the cache (COMOE_HOME)", home())):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free / GIB
        if not os.access(there, os.W_OK):
            yield FAULT, f"{what} {folder} cannot be written: choose another one"
        elif free < 2:
            yield WARNING, f"{what} has {free:.1f} GiB free; a run of the starter recipe needs 2"
        else:
            yield OK, f"{what} has {free:.1f} GiB free"


def _kit() -> Iterator[Finding]:
    from comoe.starter.registry import FOLDERS, STARTER, home

    missing = [name for name in STARTER if not (home() / FOLDERS[name][0]).is_dir()]
    if missing:
        yield (
            WARNING,
            f"{', '.join(missing)} not fetched yet; a run does it, or: python -m comoe.starter",
        )
    else:
        yield OK, f"{' and '.join(STARTER)} are in {home()}"


def _step() -> Iterator[Finding]:
    if any(find_spec(name) is None for name in EXTRAS["train"]):
        yield WARNING, "left out, as the extra train is not installed"
        return
    from comoe.train.environment import environment_of_a_child

    with tempfile.TemporaryDirectory(prefix="comoe-doctor-") as folder:
        words = ["smoke", "--ranks", "1", f"run.output_dir={folder}", "train.max_steps=1"]
        command = [sys.executable, "-m", "comoe", "train", *words]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=STEP_SECONDS,
                env=environment_of_a_child(),
            )
        except subprocess.TimeoutExpired:
            yield FAULT, f"not done in {STEP_SECONDS} s: try {' '.join(command[1:])}"
            return
        if done.returncode == 0 and (Path(folder) / "smoke" / "export").is_dir():
            yield OK, "the smoke recipe trained a step, evaluated and exported"
        else:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield FAULT, f"exit code {done.returncode}: {last}"


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": _versions,
    "devices": _devices,
    "compiler": _compiler,
    "ports": _ports,
    "network": _network,
    "memory": _memory,
    "disk": _disk,
    "starter kit": _kit,
    "training step": _step,
}
"""What is looked at -> its findings."""
