"""Frames -> patches as the vision tower takes them, in an exact and faster form of transformers' video processor."""

from typing import Any

import numpy as np
import torch


def frames_to_patches(frames: np.ndarray, video_processor: Any) -> torch.Tensor:
    """Normalised patches of frames that have their planned size; those of `Qwen3VLVideoProcessor`, bit for bit.

    A patch is temporal_patch_size x patch_size x patch_size pixels; patches that are merged into a token lie together.

    Args:
        frames: (T, H, W, 3) uint8, T a multiple of temporal_patch_size.
        video_processor: the model's own; transformers' Qwen3VLVideoProcessor.

    Returns:
        (t * h * w, 3 * temporal_patch_size * patch_size**2) float32, with the grid (t, h, w) of the plan.
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
    patches = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous().view(-1, 3, temporal * patch**2).float()
    mean, std = torch.tensor(video_processor.image_mean), torch.tensor(video_processor.image_std)
    # As transformers does it: the scaling to 0..1 goes into mean and deviation.
    scale = 1 / video_processor.rescale_factor
    return patches.sub_((mean * scale)[:, None]).div_((std * scale)[:, None]).view(len(patches), -1)
