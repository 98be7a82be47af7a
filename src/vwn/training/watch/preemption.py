"""Stop on a signal: finish the step, write a checkpoint, and exit with a code that says that the run can go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

from vwn.common.errors import UserError
from vwn.common.processes import all_reduce_max

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Exit codes of the command line: EX_TEMPFAIL of sysexits.h, and a shell's for Ctrl-C."""
AT_ONCE = 5.0  # seconds in which a repeated SIGTERM counts once: launchers pass on what their processes got too


class Stopped(UserError):
    """A run that was told to stop, has written a checkpoint, and can go on from it."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, whose checkpoint is written; "
            "go on with --resume"
        )
        self.exit_code = EXIT_CODES[signal.Signals(signum)]


class StopSignals(TrainerCallback):
    """While it is entered, SIGTERM and Ctrl-C end the training with a checkpoint, in all processes at the same step.

    It takes at most the rest of a step, one validation and one save. A second signal ends the process at once, which
    loses no checkpoint either.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        """The signal that all processes stop for."""

    def __enter__(self) -> StopSignals:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python takes signals in no other
            self.before = {number: signal.signal(number, self._take) for number in EXIT_CODES}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"\nvwn: {name}: finishing the step and writing a checkpoint; once more stops now\n".encode())
        elif number == signal.SIGINT or time.monotonic() - self.at > AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _agree(self, device: Any) -> bool:
        self.agreed = self.agreed or all_reduce_max(self.received or 0, device) or None
        return self.agreed is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agree(args.device):
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._agree(args.device):  # without another step
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agree(args.device):  # what came during the save needs no other
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed is not None:
            control.should_save = False
