"""A Hugging Face ``Trainer`` that does one step at a time: it is held at the end of each until its turn comes again."""

from __future__ import annotations

import threading
from typing import Any

from transformers import Trainer, TrainerCallback


class _Hold(TrainerCallback):
    def __init__(self, owner: HeldTrainer) -> None:
        self.owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.owner.hold(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.owner.hold(control)


class HeldTrainer:
    """Runs the trainer's own loop, with its loader, collator and callbacks, in a thread.

    Only one of main thread and trainer runs at any time, so two of them can take turns within one process.

    Args:
        trainer: ready to train, with more steps than will be asked for.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        trainer.add_callback(_Hold(self))
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()
        self._wait()

    def step(self) -> None:
        """One whole training step: batch, forward, backward, optimizer.

        Raises:
            RuntimeError: the trainer failed or has ended.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the trainer has ended; give it more steps")
        self._go.release()
        self._wait()

    def stop(self) -> None:
        """Let the loop end."""
        self._stopping = True
        self._go.release()
        self._thread.join(timeout=60)

    def hold(self, control: Any) -> None:
        """Called in the trainer's thread at the end of a step."""
        self._done.release()
        self._go.acquire()
        control.should_training_stop = self._stopping

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:  # noqa: B902 - handed to the main thread, which waits for it
            self._error = error
        finally:
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError(f"the trainer failed: {self._error}") from self._error
