"""Which program made a stored file."""

import functools
import importlib
import inspect

import xxhash


@functools.cache
def code_digest(*modules: str) -> str:
    """A hash of the source of some imported modules: it changes with what they do, at an upgrade say."""
    source = "".join(inspect.getsource(importlib.import_module(name)) for name in modules)
    return xxhash.xxh3_64_hexdigest(source.encode())
