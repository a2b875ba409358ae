"""Autosave: checkpoints between logical steps, at regular intervals and when the process is asked to stop.

Guarantee: a checkpoint is written only where a step is complete: charged, released, and used by the optimizer. SIGINT
and SIGTERM let the step in hand finish, leave a checkpoint behind, and then end the loop as they would have ended it
before; a second signal ends it at once, without a new checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from dpkit.errors import InvalidArgument

from .plan import check_count

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Autosave:
    """A context in which a run saves itself; made by :meth:`dpkit.PrivacyEngine.autosave`.

    Args:
      save: writes one checkpoint.
      prune: deletes older ones.
      steps_taken: how far the run is.
      watch: is called with what has to be asked between two steps, and with None at the end.
      every: logical steps from one checkpoint to the next.
    """

    def __init__(
        self,
        save: Callable[[], object],
        prune: Callable[[], None],
        steps_taken: Callable[[], int],
        watch: Callable[[Callable[[], None] | None], None],
        every: int,
    ) -> None:
        check_count("every", every)
        if every < 1:
            raise InvalidArgument(f"every is {every}; it is the number of steps between two checkpoints, at least 1.")
        self._save = save
        self._prune = prune
        self._steps_taken = steps_taken
        self._watch = watch
        self._every = every
        self._saved_at = -1
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Autosave:
        # Before the first step as well: a run that is killed early must not lose what its first steps were charged.
        self._write()
        self._watch(self._between_steps)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch(None)
        try:
            if kind is None and self._saved_at != self._steps_taken():
                self._write()
        finally:
            self._give_signals_back()
        if kind is None or issubclass(kind, Exception):
            self._stop_if_asked()  # an error on the way must not swallow the signal

    def _between_steps(self) -> None:
        if self._signal is not None or self._steps_taken() - self._saved_at >= self._every:
            if self._saved_at != self._steps_taken():
                self._write()
            self._stop_if_asked()

    def _write(self) -> None:
        self._save()
        self._saved_at = self._steps_taken()
        self._prune()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._stop_if_asked()
        self._signal = number

    def _stop_if_asked(self) -> None:
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}
