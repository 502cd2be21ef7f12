"""Work in threads that may be left behind, cores, and time limits."""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .probe import ClipError

Result = TypeVar("Result")


def start(work: Callable[[], Result]) -> Callable[[float | None], Result]:
    """Begin a piece of work in a thread that the process need not wait for when it ends.

    Returns:
        A function that waits for its result at most so many seconds, and raises what the work raised, or TimeoutError.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()
    try:
        jobs = _idle.pop()
    except IndexError:
        jobs = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(jobs,), daemon=True, name="read clips").start()
    jobs.put((work, done))

    def wait(timeout: float | None) -> Result:
        try:
            result, error = done.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return result

    return wait


# Jobs of threads that have nothing to do. A new thread for each clip would leave OpenMP's own behind, which torch makes.
_idle: list[queue.SimpleQueue] = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def _serve(jobs: queue.SimpleQueue) -> None:
    while True:
        work, done = jobs.get()
        try:
            outcome = work(), None
        except BaseException as error:
            outcome = None, error
        _idle.append(jobs)
        done.put(outcome)
        del work, done, outcome  # frames are not held until the next job


def deadline(
    timeout: float | None, message: str = "decoding took more than video_timeout, {:g} s"
) -> Callable[[], None]:
    """A function that raises ClipError with that message once `timeout` seconds have passed."""
    end = None if timeout is None else time.monotonic() + timeout

    def tick() -> None:
        if end is not None and time.monotonic() > end:
            raise ClipError(message.format(timeout))

    return tick


def fair_threads() -> int:
    """Decoder threads that leave the machine's cores to all worker processes alike."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    readers = (worker.num_workers if worker else 1) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, usable_cores() // readers))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
