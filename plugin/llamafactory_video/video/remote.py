"""Clips and pictures at addresses (http, https, s3 and what else fsspec opens): fetched once, into the cache."""

import os
import re
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from .probe import ClipError
from .threads import deadline

_PART = 1 << 20  # bytes read at a time
_WAITS = (1, 4)  # seconds before what failed is tried again
_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError)  # what another try does not change
_SILENCE = 60  # seconds without a byte after which a connection is given up


def fetch(address: str, place: Path, most: int, timeout: float | None) -> None:
    """Have what lies at an address in a file, whole; nothing is done if it is there.

    Other processes wait for the one that fetches it.

    Args:
        most: bytes that it may have.
        timeout: seconds that it may take.

    Raises:
        ClipError: if it cannot be had.
    """
    if place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    tick = deadline(timeout, "took more than video_timeout, {:g} s, to arrive")
    with FileLock(place.parent / "lock"):
        if place.is_file():
            return
        for wait in (*_WAITS, None):
            partial = Path(f"{place}.{os.getpid()}-{time.time_ns()}.tmp")
            try:
                _download(address, partial, most, tick)
                partial.replace(place)
                return
            except ClipError:
                raise
            except Exception as error:  # each of fsspec's file systems has errors of its own
                if wait is None or isinstance(error, _FINAL):
                    raise ClipError(f"cannot be fetched: {str(error) or type(error).__name__}") from error
            finally:
                partial.unlink(missing_ok=True)
            tick()
            time.sleep(wait)


def _download(address: str, place: Path, most: int, tick: Any) -> None:
    import fsspec

    options: dict[str, Any] = {}
    if re.match("https?://", address):
        import aiohttp

        waits = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        # As a stream: few servers answer to parts. Proxies are those of the environment.
        options = {"block_size": 0, "client_kwargs": {"timeout": waits, "trust_env": True}}
    with fsspec.open(address, "rb", skip_instance_cache=True, **options) as stream, place.open("wb") as file:
        while part := stream.read(_PART):
            if file.tell() + len(part) > most:
                raise ClipError(f"has more than video_remote_gb, {most / (1 << 30):g} GiB")
            tick()
            file.write(part)


def _forget_loop() -> None:
    """A forked process has no thread to run the event loop that its parent began; see fsspec's docs on async."""
    import fsspec.asyn

    fsspec.asyn.iothread[0] = fsspec.asyn.loop[0] = None
    fsspec.asyn.reset_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
