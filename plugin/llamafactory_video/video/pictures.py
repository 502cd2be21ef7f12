"""Pictures, upright, in RGB and bounded in size."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .probe import MAX_FRAME_PIXELS, ClipError

_PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


def open_picture(source: Any) -> Image.Image:
    """A picture as a viewer shows it, upright and in RGB.

    Args:
        source: a path, a file object, bytes, a PIL image, or a dict with `bytes` or `path`.

    Raises:
        ClipError: if it is not a picture that can be read.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        picture = source if isinstance(source, Image.Image) else _open_bounded(source)
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{_picture_name(source)}: is not a picture that can be read ({error})") from error


def picture_size(source: Any) -> tuple[int, int]:
    """Height and width of a picture as a viewer shows it, in pixels; a file is opened, not decoded."""
    if not isinstance(source, str):
        picture = open_picture(source)
        return picture.height, picture.width
    try:
        with _open_bounded(source) as picture:
            turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{source}: is not a picture that can be read ({error})") from error


def _open_bounded(source: Any) -> Image.Image:
    picture = Image.open(source, formats=_PICTURES)
    if picture.width * picture.height > MAX_FRAME_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height}; at most {MAX_FRAME_PIXELS} pixels are decoded")
    return picture


def _picture_name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "picture"
