"""A lock for one thread that runs step after step and others that want a word in between."""

import threading


class FairLock:
    """Whoever waits for it gets it before the thread that has just released it.

    A lock of ``threading`` goes to who asks first when it is free, which is nearly always that
    thread again. Not to be taken by who has it.
    """

    def __init__(self) -> None:
        # Reentrant, so that an interrupt between two lines of this shuts nobody out of a program
        # of one thread.
        self.first = threading.RLock()  # in the queue
        self.held = threading.RLock()
        self.owner: int | None = None

    @property
    def own(self) -> bool:
        """Whether the calling thread has it."""
        return self.owner == threading.get_ident()

    def __enter__(self) -> None:
        with self.first:
            self.held.acquire()
            self.owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self.owner = None
        self.held.release()
