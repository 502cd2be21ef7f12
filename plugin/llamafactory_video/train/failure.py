"""A process that fails stops all the others at once, on every node, by name.

Without it they wait in their next collective until its time-out: torchrun ends the processes of its own node only. The
failing process leaves its error in the rendezvous store, and a thread of every process looks there twice a second. No
collective is added to training.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# torchrun may start all processes anew with the same store.
_KEY = f"llamafactory_video/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
_INTERVAL = 0.5  # seconds


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """What fails in this block stops the processes of the whole run; in a run of one process it does nothing.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. The others end with exit status 1 after
    two lines on stderr, whatever they are waiting in. Under Ray it leaves that to Ray.
    """
    ray = sys.modules.get("ray")
    watched_by_ray = ray is not None and ray.is_initialized()  # it stops the workers, and names the first error
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_PORT" not in os.environ or watched_by_ray:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended,), daemon=True, name="failure-watch").start()
    try:
        yield
    except BaseException as error:
        ended.set()
        if isinstance(error, SystemExit) and not error.code:
            raise
        with contextlib.suppress(Exception):  # the store is gone where its process is
            text = f"process {os.environ['RANK']} failed: {type(error).__name__}: {error}"
            _connect(timedelta(seconds=10)).compare_set(_KEY, "", text)  # the first failure is the one to tell
            time.sleep(3 * _INTERVAL)  # process 0 may hold the store: the others read before it goes
        raise
    finally:
        ended.set()


def _connect(timeout: timedelta) -> "TCPStore":
    """A connection of one's own to the store of the run, which may not be there yet, or no longer."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timeout)


def _watch(ended: threading.Event) -> None:
    with contextlib.suppress(Exception):  # without the store, what is left is each engine's own time-out
        store = _connect(timedelta(minutes=30))
        while not ended.wait(_INTERVAL):
            if store.check([_KEY]):
                failure = store.get(_KEY).decode()
                print(f"{failure}\nThis process ({os.environ['RANK']}) stops with it.", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may hang in a collective, which no exception reaches
