"""The most host memory that a piece of work takes, read every few milliseconds beside it."""

from __future__ import annotations

import threading
import time

import psutil

INTERVAL_S = 0.005


class Memory:
    """The most memory that this process held inside the context, in bytes, by kind."""

    def __enter__(self):
        self.process = psutil.Process()
        self.anonymous = 0
        self.resident = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.started = time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.started
        self.ended.set()
        self.thread.join()

    def _sample(self):
        ended = False
        while not ended:  # read once at least
            now = self.process.memory_info()
            self.resident = max(self.resident, now.rss)
            self.anonymous = max(self.anonymous, now.rss - now.shared)
            ended = self.ended.wait(INTERVAL_S)

    def found(self) -> dict[str, float]:
        return {
            "seconds": round(self.seconds, 1),
            "anonymous_bytes": self.anonymous,
            "resident_bytes": self.resident,
        }
