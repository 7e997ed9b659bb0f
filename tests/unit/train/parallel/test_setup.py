"""What building the parts of a ZeRO-3 run leaves behind in its process: asked of real ones, it changes all of one."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[4]
ASKED = """
import ctypes, json, sys
from comoe.train.environment import prepare_process
if sys.argv[1] == "prepared":
    prepare_process(verbose=False)
from comoe.train.parallel.setup import building

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p

def mapped():
    sizes = []
    for mebibytes in (1, 24, 48):
        # Free memory of the heap serves the first blocks, whatever the threshold is.
        places = []
        for _ in range(8 if mebibytes == 1 else 1):
            before = libc.mallinfo2().hblks
            places.append(libc.malloc(ctypes.c_size_t(mebibytes << 20)))
        if libc.mallinfo2().hblks > before:
            sizes.append(mebibytes)
        for place in places:
            libc.free(ctypes.c_void_p(place))
    return sizes

with building({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}):
    inside = mapped()
print(json.dumps([inside, mapped()]))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks a glibc of 2.33 or newer"
)
@pytest.mark.parametrize("process", ["prepared", "plain"])
def test_after_a_zero_3_encoder_was_built_freed_memory_is_kept_as_before(process):
    command = [sys.executable, "-c", ASKED, process]
    answer = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    inside, after = json.loads(answer.stdout.splitlines()[-1])
    assert inside == [1, 24, 48], "each large block is the system's own again when it is freed"
    kept = process == "prepared" and not torch.cuda.is_available()
    assert after == ([] if kept else [48])
