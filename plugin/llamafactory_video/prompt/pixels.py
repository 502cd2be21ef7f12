"""Frames and pictures -> patches as the vision tower takes them, and the types of their tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..video.pictures import open_picture, picture_size
from ..video.probe import ClipError
from ..video.reader import DecodedClip
from ..video.sampling import Sampling, SamplingError
from ..video.sizes import image_size, tokens_of_image


def normalise(patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Patches as transformers' processors give them, bit for bit.

    Args:
        patches: (patches, 3 * pixels) uint8, colours one after another.
        mean, std: of each colour in 0..255, (3,).

    Returns:
        The same in float32.
    """
    colours = patches.view(len(patches), 3, -1).float()
    return colours.sub_(mean[:, None]).div_(std[:, None]).view(len(patches), -1)


def frames_to_patches(frames: np.ndarray, video_processor: Any, normalised: bool = True) -> torch.Tensor:
    """Patches of frames that have their planned size; normalised, those of `Qwen3VLVideoProcessor`, bit for bit.

    A patch is temporal_patch_size x patch_size x patch_size pixels; patches that are merged into a token lie together.

    Args:
        frames: (T, H, W, 3) uint8, T a multiple of temporal_patch_size.
        video_processor: the model's own; transformers' Qwen3VLVideoProcessor.

    Returns:
        (t * h * w, 3 * temporal_patch_size * patch_size**2), with the grid (t, h, w) of the plan; float32, or uint8 if
        not normalised.
    """
    patch, merge, temporal = (
        getattr(video_processor, name) for name in ("patch_size", "merge_size", "temporal_patch_size")
    )
    side = patch * merge
    count, height, width, _ = frames.shape
    split = torch.from_numpy(frames).view(
        count // temporal, temporal, height // side, merge, patch, width // side, merge, patch, 3
    )
    # -> time, row and column of the token, row and column in it, colour, frame, row and column in the patch
    patches = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * temporal * patch**2)
    return normalise(patches, *colour_scale(video_processor)) if normalised else patches


def colour_scale(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each colour in 0..255, (3,); as transformers does it, scaling to 0..1 goes into them."""
    scale = 1 / processor.rescale_factor
    return torch.tensor(processor.image_mean) * scale, torch.tensor(processor.image_std) * scale


def count_image_tokens(image: Any, image_processor: Any, sampling: Sampling) -> int:
    """Visual tokens of an image; see `probe.open_picture` for what an image may be."""
    size = image_processor.size
    try:
        return tokens_of_image(*picture_size(image), sampling, size.shortest_edge, size.longest_edge)
    except SamplingError as error:
        raise ClipError(f"{image}: {error}") from error


def read_image(image: Any, sampling: Sampling) -> Image.Image:
    """An image upright, in RGB and, where the dialect has a resize of its own before the processor's, resized."""
    picture = open_picture(image)
    size = image_size(picture.height, picture.width, sampling)
    return picture if size is None or size == (picture.height, picture.width) else picture.resize(size[::-1])


def vision_inputs(
    images: Sequence[Any],
    clips: Sequence[DecodedClip],
    processor: Any,
    sampling: Sampling,
    normalised: bool = True,
) -> dict[str, torch.Tensor]:
    """Patches of images and clips, as transformers' processors make them, or as `normalise` takes them.

    Args:
        sampling: of images.

    Returns:
        For images `pixel_values` (patches, 3 * 2 * 16 * 16) float32, or uint8 if not normalised, and `image_grid_thw` (images, 3); for clips
        `pixel_values_videos` and `video_grid_thw`.
    """
    inputs: dict[str, torch.Tensor] = {}
    if images:
        pictures = [read_image(image, sampling) for image in images]
        resize = sampling.dialect != "qwen_vl_utils"  # there, images have their size already
        raw = {} if normalised else {"do_rescale": False, "do_normalize": False}
        inputs.update(processor.image_processor(images=pictures, do_resize=resize, return_tensors="pt", **raw))
    if clips:
        patches = [frames_to_patches(clip.frames, processor.video_processor, normalised) for clip in clips]
        inputs["pixel_values_videos"] = patches[0] if len(patches) == 1 else torch.cat(patches)
        inputs["video_grid_thw"] = torch.tensor([clip.plan.grid for clip in clips])
    return inputs


def token_type_ids(input_ids: torch.Tensor, processor: Any) -> torch.Tensor:
    """1 at visual tokens of images, 2 at those of clips, else 0, as transformers' processor gives them.

    The model needs them for its three-dimensional positions; without them `generate` silently counts text positions.
    """
    types = torch.zeros_like(input_ids)
    types[input_ids == processor.image_token_id] = 1
    types[input_ids == processor.video_token_id] = 2
    return types
