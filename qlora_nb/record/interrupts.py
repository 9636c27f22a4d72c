"""Stopping in good order: an interrupt finishes the running step first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT (■, Ctrl-C) and SIGTERM (a cluster's pre-emption) are given to `handle` as
    their numbers.

    Only the main thread receives signals: in any other one nothing changes.
    """
    mine = threading.current_thread() is threading.main_thread()
    catch = lambda number, frame: handle(number)
    before = {
        number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM) if mine
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Inside, ■ (or Ctrl-C) and SIGTERM set the event instead of ending things: the running step is
    finished, everything saved.

    A SIGTERM is delivered again on the way out, when the folder is in order.
    """
    asked, received = threading.Event(), []

    def note(number: int) -> None:
        received.append(number)
        asked.set()

    try:
        with on_interrupt(note):
            yield asked
    finally:
        if signal.SIGTERM in received:
            signal.raise_signal(signal.SIGTERM)
