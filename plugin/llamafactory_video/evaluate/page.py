"""The report as a page: one file that opens without a network, with the frames that the model was shown."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BUDGET = 20 << 20  # bytes of all pictures; as text in the page they take a third more
_HEIGHTS, _QUALITIES = (112, 88, 64, 44), (60, 45, 30)
_WIDEST = 16383  # pixels of a WebP picture
_LEAST = 3 << 10  # bytes that each clip's pictures may take, however many clips there are


@dataclass(frozen=True)
class Strip:
    """Frames of a clip side by side, as a WebP picture.

    Attributes:
        image: a data URL.
        width, height: of each frame, in pixels.
        times: of each frame in seconds; None: the other of two frames that share a time, or a picture.
    """

    image: str
    width: int
    height: int
    times: list[float | None]

    @property
    def value(self) -> dict[str, Any]:
        return {"image": self.image, "width": self.width, "height": self.height, "times": self.times}


def make_strip(frames: np.ndarray, times: Sequence[float | None], most: int) -> Strip:
    """All frames of a clip, as large and fine as so many bytes allow.

    Args:
        frames: (T, H, W, 3) uint8.
        times: of each, (T,).
    """
    count, height, width, _ = frames.shape
    buffer = io.BytesIO()
    tallest = max(8, _WIDEST * height // (count * width))  # of many frames each is small
    for tall in sorted({min(tall, height, tallest) for tall in _HEIGHTS}, reverse=True):
        wide = max(1, width * tall // height)
        strip = Image.new("RGB", (count * wide, tall))
        for number, frame in enumerate(frames):
            picture = Image.fromarray(np.ascontiguousarray(frame)).resize((wide, tall), Image.Resampling.BILINEAR)
            strip.paste(picture, (number * wide, 0))
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            strip.save(buffer, "WEBP", quality=quality, method=4)
            if buffer.tell() <= most:
                break
        if buffer.tell() <= most:
            break
    data = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Strip(data, wide, tall, [None if time is None else round(float(time), 3) for time in times])


def bytes_for_each(clips: int) -> int:
    """How many bytes the pictures of a clip may take, so that the page stays within its budget."""
    return max(_LEAST, BUDGET // max(1, clips))


def write_page(
    path: Path,
    report: dict[str, Any],
    records: Sequence[dict[str, Any]],
    strips: Sequence[Sequence[Strip]] = (),
    played: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page.

    Args:
        report: what `report.json` holds.
        records: the lines of `records.jsonl`.
        strips: of each record's clips and pictures; none where they are not shown.
        played: where the page finds each record's clips, to play them when it is asked to; it needs none of them.
    """
    none = [()] * len(records)
    rows = [
        {**record, "strips": [strip.value for strip in shown], "play": list(urls)}
        for record, shown, urls in zip(records, strips or none, played or none, strict=True)
    ]
    text = json.dumps({"report": report, "records": rows}, ensure_ascii=False).replace("</", "<\\/")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    path.write_text(template.replace("/*DATA*/", text), encoding="utf-8")
