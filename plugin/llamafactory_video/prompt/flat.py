"""Samples laid end to end, without padding: all that a forward pass must know of their layout.

It is worked out where clips are read, so the forward pass (`model.flat`) never waits for the device.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..video.reader import DecodedClip
from ..video.sampling import Sampling
from .pixels import colour_scale, vision_inputs
from .tokens import IGNORE_INDEX


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)  # what is kept may be trained with, also if a question was the first to ask for it
def _grid(height: int, width: int, merge: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one picture or pair of frames, in patches: coordinates and interpolation of its position embeddings.

    Follows transformers' `rot_pos_emb` and `fast_pos_embed_interpolate`: patches that are merged into a token lie
    together, and positions are read bilinearly from a square table of `side` x `side`.

    Returns:
        Row and column, (patches, 2); rows of the table, (4, patches); their weights, (4, patches) float32.
    """
    order = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    order = order.permute(0, 2, 1, 3).flatten()
    rows, columns = order // width, order % width
    at = [torch.linspace(0, side - 1, n) for n in (height, width)]
    low = [x.int() for x in at]
    high = [(x + 1).clip(max=side - 1) for x in low]
    part = [x - floor for x, floor in zip(at, low, strict=True)]
    index = [y[rows] * side + x[columns] for y in (low[0], high[0]) for x in (low[1], high[1])]
    shares = [(1 - part[0], part[0]), (1 - part[1], part[1])]
    weight = [y[rows] * x[columns] for y in shares[0] for x in shares[1]]
    return torch.stack([rows, columns], dim=1), torch.stack(index).long(), torch.stack(weight)


def rope_positions(
    ids: np.ndarray, images: Iterator[tuple[int, int]], clips: Iterator[tuple[int, int]], pads: tuple[int, int]
) -> np.ndarray:
    """Positions in time, height and width of a sample's tokens, as `Qwen3VLModel.get_rope_index` gives them, (3, n).

    Args:
        ids: of the sample, (n,).
        images, clips: height and width in tokens of each picture and of each pair of frames still to come; those of
            this sample are taken from their fronts.
        pads: the token ids that stand for them.
    """
    kinds = np.select([ids == pad for pad in pads], [1, 2], 0)
    bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    positions, position = np.empty((3, len(ids)), np.int64), 0
    for begin, end in itertools.pairwise(bounds):
        if not kinds[begin]:
            positions[:, begin:end] = np.arange(position, position + end - begin)
            position += end - begin
            continue
        height, width = next(images if kinds[begin] == 1 else clips)
        positions[0, begin:end] = position
        positions[1, begin:end] = position + np.repeat(np.arange(height), width)
        positions[2, begin:end] = position + np.tile(np.arange(width), height)
        position += max(height, width)
    return positions


def lay_vision(
    images: Sequence[Any], clips: Sequence[DecodedClip], processor: Any, sampling: Sampling, table_side: int
) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    """Pictures and clips for the vision tower, end to end.

    Args: see `lay_flat`.

    Returns:
        What the tower takes, see `model.flat`; and the grids of pictures and of clips, in patches of time, height, width.
    """
    vision = vision_inputs(images, clips, processor, sampling, normalised=False)
    image_grids, clip_grids = (
        vision.get(f"{kind}_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist() for kind in ("image", "video")
    )
    video = processor.video_processor
    merge = video.merge_size
    patches = [vision[name] for name in ("pixel_values", "pixel_values_videos") if name in vision]
    # Something is always shown to the tower: where weights are spread over processes, all must pass it.
    towers = [*image_grids, *clip_grids] or [(1, merge, merge)]
    if not patches:
        patches = [torch.zeros(merge**2, 3 * video.temporal_patch_size * video.patch_size**2, dtype=torch.uint8)]
    pictures = [(h, w) for t, h, w in towers for _ in range(t)]
    coordinates, index, weight = zip(*(_grid(h, w, merge, table_side) for h, w in pictures), strict=True)
    areas = [h * w for h, w in pictures]
    layout = {
        "patches": torch.cat(patches),
        "vision_cu_seqlens": torch.tensor([0, *itertools.accumulate(areas)], dtype=torch.int32),
        "vision_longest": _round_up(max(areas)),
        "coordinates": torch.cat(coordinates),
        "table_index": torch.cat(index, dim=1),
        "table_weight": torch.cat(weight, dim=1),
        "colour_scale": colour_scale(video),
    }
    return layout, image_grids, clip_grids


def lay_flat(
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    images: Sequence[Any],
    clips: Sequence[DecodedClip],
    processor: Any,
    sampling: Sampling,
    table_side: int,
) -> dict[str, Any]:
    """One micro-batch of samples end to end.

    Args:
        samples: ids and labels of each, (n,) both.
        images, clips: of all samples, in order of their tokens.
        sampling: of images.
        table_side: rows and columns of the vision tower's table of position embeddings.

    Returns:
        For the model `input_ids` (1, tokens), `position_ids` (3, 1, tokens), `logits_to_keep` (labels,), the positions
        before each label, and `flat`, see `model.flat`; for the loss `labels` (labels,); for the trainer `counts`, see
        `Throughput.add`, with `supervised`, the labels of each sample.
    """
    pads = processor.image_token_id, processor.video_token_id
    merge = processor.video_processor.merge_size
    vision, image_grids, clip_grids = lay_vision(images, clips, processor, sampling, table_side)
    ids = [np.asarray(sample[0]) for sample in samples]
    lengths = [len(each) for each in ids]
    starts = [0, *itertools.accumulate(lengths)]
    in_tokens = [
        iter([(h // merge, w // merge) for t, h, w in grids for _ in range(t)]) for grids in (image_grids, clip_grids)
    ]
    positions = np.concatenate([rope_positions(each, *in_tokens, pads) for each in ids], axis=1)
    keep, targets = [], []
    for start, (_, labels) in zip(starts, samples, strict=False):
        labels = np.asarray(labels)
        before = np.flatnonzero(labels[1:] != IGNORE_INDEX)
        keep.append(before + start)
        targets.append(labels[before + 1])
    supervised = [len(each) for each in keep]
    keep, targets = np.concatenate(keep), np.concatenate(targets)
    if not len(keep):  # a gradient of zero is one too
        keep, targets = np.array([0]), np.array([IGNORE_INDEX])
    whole = np.concatenate(ids)

    grids = [*image_grids, *clip_grids]
    visual_at = np.concatenate([np.flatnonzero(whole == pad) for pad in pads])
    return {
        "input_ids": torch.from_numpy(whole)[None],
        "position_ids": torch.from_numpy(positions)[:, None],
        "logits_to_keep": torch.from_numpy(keep),
        "labels": torch.from_numpy(targets),
        "flat": {
            "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
            "longest": _round_up(max(lengths)),
            "visual_at": torch.from_numpy(visual_at) if grids else None,
            **vision,
        },
        "counts": {
            "images": len(images),
            "clips": len(clips),
            "lengths": lengths,
            "supervised": supervised,
            "grids": [tuple(grid) for grid in grids],
        },
    }


def _round_up(length: int) -> int:
    """To a power of two: compiled layers take a new length for a new program."""
    return 1 << (length - 1).bit_length()
