"""A bounded amount of something, such as memory, that threads take shares of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """So much of it there is; who asks for more than all of it gets all of it."""

    def __init__(self, whole: int) -> None:
        self.whole, self._free, self._changed = whole, whole, threading.Condition()

    def take(self, share: int) -> None:
        """Wait for a share, and take it."""
        share = min(share, self.whole)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= share)
            self._free -= share

    def give(self, share: int) -> None:
        """Give a share back."""
        with self._changed:
            self._free += min(share, self.whole)
            self._changed.notify_all()

    @contextmanager
    def share(self, share: int) -> Iterator[None]:
        """Take a share for a while."""
        self.take(share)
        try:
            yield
        finally:
            self.give(share)
