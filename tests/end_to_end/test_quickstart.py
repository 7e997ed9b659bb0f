"""The first command of the README, with the recipe that needs no download."""

import pytest

from tests.end_to_end.commands import LEAN, ROOT, SMOKE

pytestmark = [
    pytest.mark.end_to_end,
    # launch/test.sh makes the environment; without it this test would install one, which is that
    # script's job.
    pytest.mark.skipif(
        not (ROOT / ".venv/.stamp").exists(), reason="launch/setup.sh has not made .venv here"
    ),
]


def test_quickstart_trains_prints_the_table_and_the_next_lines_and_can_be_typed_again(
    terminal, tmp_path
):
    words = f"launch/quickstart.sh --config {SMOKE} train.max_steps=6".split()
    words = ["bash", *words, f"run.output_dir={tmp_path}", *LEAN]
    first = terminal.run(*words)
    assert first.code == 0, first.out + first.err
    assert (tmp_path / "smoke" / "results.json").is_file()
    for shown in ("task", "macro_f1", "tensorboard --logdir", "comoe predict --model"):
        assert shown in first.out
    again = terminal.run(*words)
    assert again.code == 0, again.out + again.err
    assert "nothing to do" in again.out and "macro_f1" in again.out


def test_quickstart_refuses_a_wrong_key_before_it_does_anything(terminal):
    done = terminal.run("bash", "launch/quickstart.sh", "train.eval_evry=3")
    assert done.code != 0 and "did you mean train.eval_every" in done.err + done.out
