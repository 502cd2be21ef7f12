"""What a conversation shows, and who says what: clips, pictures, roles. Imports nothing of the package."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

VIDEO_PLACEHOLDER = "<video>"
IMAGE_PLACEHOLDER = "<image>"
# Tokens by which the prompt is laid out. Inside a text they would shift turns, or counts of visual tokens.
LAYOUT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
USER, ASSISTANT, SYSTEM, TOOL, FUNCTION = "user", "assistant", "system", "observation", "function"
ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
    "tool": TOOL,
    "observation": TOOL,
    "function_call": FUNCTION,
}
# Settings of a clip that stand in place of the recipe's, under their names in `Sampling`.
WHOLE_SETTINGS = (
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "nframes",
    "resized_height",
    "resized_width",
)
_OWN_SETTINGS = ("fps", *WHOLE_SETTINGS)


@dataclass(frozen=True)
class Clip:
    """A clip of a record: a file or a list of frame pictures, with its own settings.

    Attributes:
        path: the video file; None if `frames` are given.
        frames: pictures in order, (n,).
        frame_rate: pictures per second of `frames`.
        times: seconds of each of `frames`, increasing, (n,).
        start, end: seconds; only what lies in [start, end) is the clip, and its times count from its first frame.
        fps, min_frames, max_frames, min_pixels, max_pixels, total_pixels: override the recipe's video_* keys.
        nframes, resized_height, resized_width: number of frames, and their size in pixels, in `qwen_vl_utils`.
    """

    path: str | None = None
    frames: tuple[str, ...] = ()
    frame_rate: float | None = None
    times: tuple[float, ...] = ()
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    nframes: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    @property
    def settings(self) -> dict[str, float | int | None]:
        """Its own settings, which stand over the recipe's, under their names in `Sampling`; None: as the recipe's."""
        return {name: getattr(self, name) for name in _OWN_SETTINGS}

    @property
    def given(self) -> dict[str, Any]:
        """All that is set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}

    def __str__(self) -> str:
        """The clip in an error message."""
        if self.frames:
            name = f"{self.frames[0]} … ({len(self.frames)} frames)"
        else:
            name = self.path if isinstance(self.path, str) else "the uploaded clip"
        if self.start is None and self.end is None:
            return name
        end = "…" if self.end is None else f"{self.end:g} s"
        return f"{name} from {self.start or 0:g} s to {end}"

    def encode(self, plan_digest: str = "") -> str:
        """One string for a table, which `decode_clip` reads: the path alone where nothing else is set.

        Args:
            plan_digest: of the plan that a prompt stored beside it was built from.
        """
        given = self.given
        if plan_digest:
            given["planned"] = plan_digest
        if list(given) == ["path"] and not self.path.startswith("{"):
            return self.path
        return json.dumps(given, ensure_ascii=False)


@dataclass
class Conversation:
    """A checked record.

    Attributes:
        messages: (role, text) in order; placeholders stand where clips and images are shown.
        images: picture paths, or pictures of a hub's data set, in order of their placeholders.
        videos: clips, in order of their placeholders.
        system: the system prompt, or "".
        tools: JSON text of the tools on offer, or "".
        unlearnt: numbers of the messages that are answers and are not trained on.
        source: the record that it comes from, for messages; "" for what is asked in chat.
        notes: what was read otherwise than it stands, for a person.
    """

    messages: list[tuple[str, str]]
    images: list[Any] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)
    system: str = ""
    tools: str = ""
    unlearnt: tuple[int, ...] = ()
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The record in an error message."""
        return self.source or "a record"


def laid_out(text: str, clips: Iterator[Any], images: Iterator[Any]) -> list[tuple[str, Any]]:
    """A text in pieces, ("text", str), ("video", clip) and ("image", picture), in order.

    Args:
        clips, images: those still to come; the ones that the text shows are taken.
    """
    shown = {VIDEO_PLACEHOLDER: ("video", clips), IMAGE_PLACEHOLDER: ("image", images)}
    pieces = []
    for piece in re.split(f"({VIDEO_PLACEHOLDER}|{IMAGE_PLACEHOLDER})", text):
        if piece in shown:
            kind, left = shown[piece]
            pieces.append((kind, next(left)))
        elif piece:
            pieces.append(("text", piece))
    return pieces


def strip_around_placeholders(text: str) -> str:
    """The text of a human turn as the official trainer uses it: each piece around a placeholder stripped.

    `<video>\\n描述…` becomes the clip followed directly by 描述…, as in the usual inference message.
    """
    return "".join(piece.strip() for piece in re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})", text))


def is_address(path: Any) -> bool:
    """Whether a path is an address rather than a file's; one letter before the colon is a drive of Windows."""
    return isinstance(path, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path) is not None
