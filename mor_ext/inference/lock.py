"""A lock for one thread that runs step after step and others that want a word in between."""

import threading


class FairLock:
    """Whoever waits for it gets it before the thread that has just released it.

    A lock of ``threading`` goes to who asks first when it is free, which is nearly always that
    thread again. Not reentrant.
    """

    def __init__(self) -> None:
        self.first = threading.Lock()  # in the queue
        self.held = threading.Lock()

    def __enter__(self) -> None:
        with self.first:
            self.held.acquire()

    def __exit__(self, *_: object) -> None:
        self.held.release()
