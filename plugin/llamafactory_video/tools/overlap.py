"""Held-out clips held against those that were trained on, before a model is judged by them."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..evaluate.overlap import alike, same
from ..evaluate.report import recording_of
from ..media import Conversation
from ..records.files import registered_file
from ..records.question import Asked, read_questions
from ..video.threads import usable_cores
from .score import source_of

_FRAMES = 5  # of a clip that are compared
_FEW = 2000  # clips in all that are compared by their pictures without being asked to
_NAMED = 20


def check_overlap(asked: Sequence[Asked], models: Sequence[str], options: Any) -> None:
    """See that no clip of the questions was trained on.

    Args:
        models: folders; what a run of ours was trained on is in their run.json.
        options: `trained_on`, further annotation files; `source`, what tells a clip's recording; `near`, whether clips are
            compared by their pictures (None: where they are few); `allow_overlap`.

    Raises:
        ValueError: naming those that were, or are nearly the same as one that was.
    """
    trained = sorted(
        {clip for path, media_dir in _trained(models, options) for clip in _clips(read_questions(path, media_dir))}
    )
    held = sorted(set(_clips(asked)))
    if not trained or not held or options.allow_overlap:
        return
    recording = recording_of(source_of(options.source))
    recordings = [{clip: recording([os.path.abspath(clip)]) for clip in clips} for clips in (held, trained)]
    found = {clip: f"is of the same recording as {other}, which was trained on" for clip, other in same(*recordings)}
    for clip, other in same(*_contents(held, trained)):
        found.setdefault(clip, f"is the same file as {other}, which was trained on")
    near = options.near
    if near is None and len(held) + len(trained) > _FEW:
        print(
            f"lmf-video: {len(held)} clips are held against {len(trained)} that were trained on by recording and content; by their "
            "pictures too with --near",
            file=sys.stderr,
        )
    if near or (near is None and len(held) + len(trained) <= _FEW):
        for clip, other in alike(*_pictures(held), *_pictures(trained)):
            found.setdefault(clip, f"looks like {other}, which was trained on")
    if found:
        lines = [f"  {clip} {what}" for clip, what in found.items()]
        more = f"\n  … and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        raise ValueError(
            f"{len(found)} of {len(held)} clips would not tell what the model has learnt:\n"
            + "\n".join(lines[:_NAMED])
            + f"{more}\nTake them out, or judge all the same with --allow-overlap"
        )


def _trained(models: Sequence[str], options: Any) -> Iterable[tuple[Path, Path | None]]:
    """Annotation files that were trained on, with the folders of their clips."""
    for path in options.trained_on:
        if not path.exists():
            raise ValueError(f"--trained-on: no file {path}")
        yield path, None
    for model in models:
        record = Path(model, "run.json")
        if not record.is_file():
            continue
        recipe = json.loads(record.read_text(encoding="utf-8")).get("recipe", {})
        folder = Path(recipe.get("dataset_dir", "data"))
        for name in str(recipe.get("dataset", "")).split(","):
            file = registered_file(folder, name.strip())
            if file is not None and file.exists():
                yield file, Path(recipe.get("media_dir") or folder)
            else:
                print(
                    f"lmf-video: {model} was trained on {name}, which is not here, so its clips cannot be held against these; "
                    "--trained-on names its file",
                    file=sys.stderr,
                )


def _clips(questions: Iterable[Asked]) -> Iterable[str]:
    for each in questions:
        if isinstance(each.conversation, Conversation):
            for clip in each.conversation.videos:
                path = clip.frames[0] if clip.frames else clip.path
                if isinstance(path, str) and os.path.isfile(path):
                    yield path


def _contents(held: Sequence[str], trained: Sequence[str]) -> list[dict[str, str]]:
    """Hashes of the files that have a size which one of the others has."""
    from ..video.cache import content_hash
    from ..video.probe import file_stamp

    sizes = [{clip: os.path.getsize(clip) for clip in clips} for clips in (held, trained)]
    shared = set(sizes[0].values()) & set(sizes[1].values())
    return [
        {clip: content_hash(clip, file_stamp(clip)) if size in shared else "" for clip, size in each.items()}
        for each in sizes
    ]


def _pictures(clips: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Perceptual hashes of frames all over each clip, of those that can be read and show more than one shade."""
    from imagehash import phash
    from PIL import Image

    from ..video.probe import ClipError
    from ..video.reader import ClipReader
    from ..video.sampling import Sampling

    # Few and small: what is compared is the shape of what is seen.
    reader = ClipReader(
        Sampling("qwen_vl_utils", fps=1, min_frames=6, max_frames=6, min_pixels=4096, max_pixels=16384)
    )

    def look(clip: str) -> np.ndarray | None:
        try:
            frames = reader.read(clip).frames
        except ClipError:
            return None
        numbers = np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)
        if max(frame.std() for frame in frames) < 4:
            return None
        bits = [phash(Image.fromarray(frames[number])).hash.flatten() for number in numbers]
        return np.array([np.packbits(each).view(np.uint64)[0] for each in bits])

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(tqdm(pool.map(look, clips), "Comparing pictures", len(clips), unit=" clips", mininterval=1))
    seen = [(clip, hashes) for clip, hashes in zip(clips, found, strict=True) if hashes is not None]
    names = [clip for clip, _ in seen]
    return names, np.array([hashes for _, hashes in seen], np.uint64).reshape(len(seen), _FRAMES)
