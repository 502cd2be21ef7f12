"""The planned frames of a clip, decoded and resized: uint8, nothing else."""

from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .probe import ClipError, open_container, video_stream
from .sampling import FramePlan


def resize_frame(frame: np.ndarray, plan: FramePlan) -> np.ndarray:
    """One frame at its planned size, by the resizing of transformers' video processor.

    Args:
        frame: (H, W, 3) uint8.

    Returns:
        (plan.height, plan.width, 3) uint8.
    """
    if plan.pre_size is not None and plan.pre_size != frame.shape[:2]:
        frame = np.asarray(Image.fromarray(frame).resize(plan.pre_size[::-1]))
    if frame.shape[:2] == (plan.height, plan.width):
        return frame
    planes = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    planes = transforms.resize(planes, [plan.height, plan.width], InterpolationMode.BICUBIC, antialias=True)
    return planes.permute(1, 2, 0).numpy()


def decode_frames(source: str | BinaryIO, plan: FramePlan) -> np.ndarray:
    """The planned frames of a video file, (T, plan.height, plan.width, 3) uint8.

    Only wanted frames are converted to RGB, and each is resized at once, so memory holds the planned size alone.

    Raises:
        ClipError: if the file yields fewer frames than its packets promised.
    """
    shown = np.empty((len(plan.indices), plan.height, plan.width, 3), np.uint8)
    wanted = sorted(set(plan.indices))
    places = {index: [at for at, i in enumerate(plan.indices) if i == index] for index in wanted}
    decoded = 0
    for index, frame in _frames(source, wanted[-1]):
        decoded = index + 1
        if index in places:
            shown[places.pop(index)] = resize_frame(frame.to_ndarray(format="rgb24"), plan)
    if places:
        raise ClipError(f"yields {decoded} frames where its packets promise at least {wanted[-1] + 1}; is it damaged?")
    return shown


def _frames(source: str | BinaryIO, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
    try:
        with open_container(source) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                yield index, frame
                if index == last:
                    return
    except av.FFmpegError as error:
        raise ClipError(f"cannot be decoded ({error.strerror})") from error
