"""Questions about clips and pictures, as conversations whose last answer is still to come."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..media import ASSISTANT, IMAGE_PLACEHOLDER, ROLES, VIDEO_PLACEHOLDER, Conversation
from .clips import VIDEO_FILES, Problem
from .files import MediaFinder, annotation_files, read_records
from .parse import parse_record

TO_COME = "?"  # in place of the answer, which is not shown


class _Finder:
    """Takes files that are there, and addresses: who reads a clip says whether they are fetched."""

    remote = True

    def __call__(self, path: str) -> str | None:
        return path if os.path.isfile(path) else None


def clip_argument(text: str) -> str | dict[str, Any]:
    """A clip as it is typed: a path, or a part of a file, in seconds, as in `clip.mp4#12.5-20`, `#12.5-` and `#-20`."""
    part = re.fullmatch(r"(.+)#(\d+(?:\.\d+)?)?-(\d+(?:\.\d+)?)?", text)
    if part is None or os.path.exists(text):
        return text
    ends = {"start": part[2], "end": part[3]}
    return {"path": part[1], **{name: float(value) for name, value in ends.items() if value}}


def clip_name(clip: str | dict[str, Any]) -> str:
    """What a person calls a clip that `clip_argument` has read."""
    if isinstance(clip, str):
        return clip
    return (
        f"{clip['path']}#{clip.get('start', 0):g}-{clip['end']:g}"
        if "end" in clip
        else f"{clip['path']}#{clip['start']:g}-"
    )


def clip_files(folder: Path) -> list[Path]:
    """The video files of a folder, by their names' endings, in order.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_FILES and file.is_file())
    if not files:
        raise ValueError(f"{folder}: no video file in this folder; known endings are {' '.join(sorted(VIDEO_FILES))}")
    return files


def _listed(media: Any) -> list[Any]:
    if media is None:
        return []
    if isinstance(media, str | os.PathLike | dict):
        media = [media]
    return [os.fspath(each) if isinstance(each, os.PathLike) else each for each in media]


def parse_question(
    turns: Sequence[Any],
    videos: Sequence[Any],
    images: Sequence[Any],
    system: str,
    tools: Sequence[Any],
    find: Callable[[str], str | None],
) -> tuple[Conversation, list[Problem]]:
    """A question checked as records are, with an answer that is still to come; see `parse_record`."""
    record = {
        "messages": [*turns, {"role": "assistant", "content": TO_COME}],
        "videos": videos,
        "images": images,
        "system": system,
        "tools": tools,
    }
    return parse_record({name: value for name, value in record.items() if value}, find)


def question(
    prompt: str | Sequence[dict[str, Any]], video: Any = None, image: Any = None, system: str = ""
) -> Conversation:
    """A question as a checked conversation.

    Args:
        prompt: a text, in which `<video>` and `<image>` stand where clips and pictures are shown; without them these come
            first. Or all turns so far, `{"role": …, "content": …}` as OpenAI has them, the last one the user's.
        video: what a record has as a clip: a path, an object with `path` or `frames` and settings; or a list of these.
        image: a path of a picture, or a list of them.
        system: the system prompt.

    Raises:
        ValueError: saying all that is wrong with it.
    """
    videos, images = _listed(video), _listed(image)
    for path in (each.get("path") if isinstance(each, dict) else each for each in (*videos, *images)):
        if isinstance(path, str) and "://" not in path and not os.path.isfile(path):
            raise ValueError(f"no file {path}")
    if isinstance(prompt, str):
        for mark, given in ((IMAGE_PLACEHOLDER, images), (VIDEO_PLACEHOLDER, videos)):
            if mark not in prompt:
                prompt = mark * len(given) + prompt
        turns = [{"role": "user", "content": prompt}]
    else:
        turns = [*prompt]
        if not turns or not isinstance(turns[-1], dict) or turns[-1].get("role") not in ("user", "tool"):
            raise ValueError("the last turn must be the user's, which is answered")
    conversation, problems = parse_question(turns, videos, images, system, (), _Finder())
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    return conversation


@dataclass(frozen=True)
class Asked:
    """A question of many.

    Attributes:
        source: where it comes from, unlike all others.
        conversation: the question, or what is wrong with it.
        shown: its clips and pictures, as they were named.
        label: the answer that its record holds, or None.
    """

    source: str
    conversation: Conversation | ValueError
    shown: tuple[str, ...] = ()
    label: Any = None


def read_questions(path: Path, media_dir: Path | None = None) -> Iterator[Asked]:
    """The questions of a data set's records: all turns before the last answer.

    Args:
        path: a .json or .jsonl file, or a folder of them.
        media_dir: folder to which paths in records are relative; None: that of the file.
    """
    for file in annotation_files(path):
        find = MediaFinder(str(media_dir or file.parent), remote=True)
        for raw in read_records(file):
            if raw.error:
                yield Asked(raw.location, ValueError(raw.error))
                continue
            record, label = _without_answer(raw.value)
            conversation, problems = parse_record(record, find)
            shown = tuple(str(each) for each in (*conversation.videos, *conversation.images) if each is not None)
            error = ValueError("; ".join(map(str, problems))) if problems else None
            yield Asked(raw.location, error or conversation, shown, label)


def _without_answer(record: Any) -> tuple[Any, Any]:
    """A record with its last answer taken out, and that answer; what is no record stays as it is."""
    name = "conversations" if isinstance(record, dict) and "conversations" in record else "messages"
    turns = record.get(name) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return record, None
    last = turns[-1]
    speaker, text = ("from", "value") if "from" in last else ("role", "content")
    answered = ROLES.get(last.get(speaker)) == ASSISTANT
    before = turns[:-1] if answered else turns
    return {**record, name: [*before, {speaker: "assistant", text: TO_COME}]}, last.get(text) if answered else None
