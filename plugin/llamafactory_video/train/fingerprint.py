"""Counts and hashes of the data that a run trains on."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import pyarrow as pa

from ..records.clips import decode_clip

_ROWS = 1000  # read from a data set at a time
_FILES = 2000  # asked for their sizes by a thread at a time
_THREADS = 16  # on a network file system the wait for an answer is what takes time
_MEDIA = {"images": "pictures", "videos": "clips", "audios": "sounds"}
_COVERS = {
    "sha256": "all records in order, as one JSON array of arrays of their columns (columns and keys in order of their "
    "names, no blanks, UTF-8), without the places that they come from; files by their path relative to media_dir, lists of numbers as the sha256 of int64, little-endian",
    "files_sha256": "a line `path<TAB>bytes` for each file, sorted; paths relative to media_dir; not what is in them",
}


def describe_data(dataset: Any, media_dir: str) -> dict[str, Any]:
    """Counts and fingerprints of a data set, as it is trained on.

    The same records with the same files give the same fingerprint wherever they lie below `media_dir`. Files are asked
    for their sizes and not read: 200,000 records take some seconds.

    Args:
        dataset: datasets.Dataset of `table.FEATURES`, of LLaMA-Factory's columns, or packed.
    """
    if not isinstance(dataset, datasets.Dataset):
        return {"records": None, "why": "streaming: records are read as they are trained on, and have no fingerprint"}
    prefix = os.path.join(media_dir, "")
    digest, files = hashlib.sha256(b"["), {}
    seen: dict[str, set[str]] = {kind: set() for kind in _MEDIA.values()}
    columns = sorted(set(dataset.column_names) - {"_source"})
    for i, table in enumerate(dataset.with_format("arrow").iter(_ROWS)):
        values = []
        for name in columns:
            column = _values(table[name].combine_chunks())
            kind = _MEDIA.get(name.removeprefix("_"))
            if kind is not None:
                column = [row and [_media(item, prefix, seen[kind], files) for item in row] for row in column]
            values.append(column)
        text = json.dumps(
            list(zip(*values, strict=True)), ensure_ascii=False, separators=(",", ":"), default=_digest_of
        )
        digest.update((("," if i else "") + text[1:-1]).encode("utf-8", "surrogatepass"))
    digest.update(b"]")
    sizes = _file_sizes(files)
    listing = hashlib.sha256()
    for path, size in sorted(sizes.items()):
        listing.update(f"{path}\t{'missing' if size is None else size}\n".encode("utf-8", "surrogateescape"))
    named = {kind: len(paths) for kind, paths in seen.items() if paths}
    missing = sum(size is None for size in sizes.values())
    return {
        "records": len(dataset),
        "sha256": digest.hexdigest(),
        **named,
        "files": len(sizes),
        **({"files_missing": missing} if missing else {}),
        "files_bytes": sum(size or 0 for size in sizes.values()),
        "files_sha256": listing.hexdigest(),
        "hashes_cover": _COVERS,
    }


def _values(array: pa.Array) -> list[Any]:
    """As `to_pylist`, several times as fast; keys of structs sorted, lists of whole numbers as their sha256."""
    kind = array.type
    if pa.types.is_struct(kind):
        names = sorted(field.name for field in kind)
        fields = [_values(array.field(name)) for name in names]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_pylist()
        inner = array.values.slice(offsets[0], offsets[-1] - offsets[0])  # a batch shares its table's values
        spans = [(a - offsets[0], b - offsets[0]) for a, b in itertools.pairwise(offsets)]
        if pa.types.is_integer(kind.value_type) and not inner.null_count:
            numbers = inner.to_numpy().astype("<i8")
            rows = [hashlib.sha256(numbers[a:b]).hexdigest() for a, b in spans]
        else:
            items = _values(inner)
            rows = [items[a:b] for a, b in spans]
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    else:
        return array.to_pylist()
    if array.null_count:
        rows = [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _digest_of(value: Any) -> str:
    """What JSON cannot hold: bytes of pictures that lie in the data set itself."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _media(item: Any, prefix: str, seen: set[str], files: dict[str, str]) -> Any:
    """A clip or picture as it is hashed; notes it in `seen`, and its files, path below media_dir -> path."""
    if isinstance(item, str) and not item.startswith("{"):
        name = item.removeprefix(prefix)
        files[name] = item
        seen.add(name)
        return name
    if not isinstance(item, str):  # a picture of a hub's data set, which lies in the table itself
        seen.add(_digest_of(item["bytes"]))
        return {"bytes": item["bytes"]}
    clip = decode_clip(item)
    paths = clip.frames or (clip.path,)
    names = tuple(path.removeprefix(prefix) for path in paths)
    files.update(zip(names, paths, strict=True))
    seen.add("\n".join(names))
    return dataclasses.replace(clip, **({"frames": names} if clip.frames else {"path": names[0]})).encode()


def _file_sizes(files: Mapping[str, str]) -> dict[str, int | None]:
    """Bytes of each file, by its key; None where there is none."""

    def ask(names: list[str]) -> list[int | None]:
        sizes: list[int | None] = []
        for name in names:
            try:
                sizes.append(os.stat(files[name]).st_size)
            except OSError:
                sizes.append(None)
        return sizes

    names = list(files)
    parts = [names[i : i + _FILES] for i in range(0, len(names), _FILES)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, (size for sizes in pool.map(ask, parts) for size in sizes), strict=True))
