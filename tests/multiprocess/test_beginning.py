"""The run folder on several machines: all ranks must see what rank 0 writes there."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess


def take_on_each(folders: list[str]) -> list[str]:
    """What each rank is told when it takes the folder of its number, first one that all share."""
    import comoe.train.run_folder as beginning
    from comoe.train.environment import prepare_process
    from comoe.train.fault.watchdog import Watchdog

    os.environ.update(CROSS_SIZE="2", CROSS_RANK=os.environ["RANK"])
    beginning.PATIENCE = 1.0
    prepare_process(verbose=False)
    from comoe.train.parallel.setup import start_ranks

    start_ranks(timeout_seconds=60)
    watch = Watchdog()
    watch.start(timeout_seconds=60)
    said = []
    for folder in (folders[0], folders[int(os.environ["RANK"])]):
        try:
            with ExitStack() as held:
                beginning.take(Path(folder), held, fresh=True)
            said.append("taken")
        except ValueError as error:
            said.append(str(error))
    watch.leave(0)
    return said


def test_a_run_folder_that_a_machine_does_not_see_is_refused_on_all(tmp_path):
    folders = [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    first, second = run_ranks("tests.multiprocess.test_beginning:take_on_each", 2, folders=folders)
    assert first[0] == second[0] == "taken"
    for said, folder in ((first[1], folders[0]), (second[1], folders[1])):
        assert said.startswith(f"{folder} is not the same folder on all machines: ")
        assert "(node 1) cannot see" in said
        assert said.endswith("set run.output_dir to a folder that all machines share.")
