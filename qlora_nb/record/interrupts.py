"""Stopping in good order: an interrupt finishes the running step first.

■ in Jupyter and Ctrl-C send SIGINT, a cluster that wants its machine back sends SIGTERM. Python
raises KeyboardInterrupt wherever it stands, which may be in the middle of an optimizer step; here
the signal sets an event instead, and the training loop looks at it between two steps.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are given to `handle` as their numbers.

    Only the main thread receives signals: in any other one nothing changes.
    """

    def catch(number: int, frame) -> None:
        handle(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, catch)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Inside, ■ (or Ctrl-C) and SIGTERM set the event: whoever watches it finishes its step and
    saves everything.

    A SIGTERM is delivered again on the way out, when the folder is in order.
    """
    asked = threading.Event()
    received = []

    def note(number: int) -> None:
        received.append(number)
        asked.set()

    try:
        with on_interrupt(note):
            yield asked
    finally:
        if signal.SIGTERM in received:
            signal.raise_signal(signal.SIGTERM)
