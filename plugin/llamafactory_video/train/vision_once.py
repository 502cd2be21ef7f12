"""One call of the vision tower for a batch, whatever it shows."""

from types import MethodType
from typing import Any

import torch


def call_vision_once(model: torch.nn.Module) -> None:
    """Let Qwen3-VL take the images and the clips of a batch through its vision tower together.

    transformers calls it once for images and once for clips. Where weights are spread over processes (ZeRO-3, FSDP),
    every call gathers them from all: a process whose batch has both would wait for one whose batch has clips alone.
    Patches attend within their own picture or time slice, so the result is the same.

    Args:
        model: transformers' Qwen3VLModel or Qwen3VLMoeModel; its `forward` is replaced.
    """
    model.forward = MethodType(_forward, model)  # a method, so a deep copy of the model calls its own


def _forward(model: torch.nn.Module, *args: Any, pixel_values=None, pixel_values_videos=None, **kwargs: Any) -> Any:
    shown = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
    if pixel_values is None or pixel_values_videos is None:
        return type(model).forward(model, *args, **shown, **kwargs)
    images, clips = kwargs["image_grid_thw"], kwargs["video_grid_thw"]
    features = model.get_image_features(
        torch.cat([pixel_values, pixel_values_videos]), torch.cat([images, clips]), return_dict=True
    )
    tokens = sum(len(embeds) for embeds in features.pooler_output[: len(images)])

    def part(items: slice, rows: slice) -> Any:
        deepstack = [layer[rows] for layer in features.deepstack_features]
        return type(features)(pooler_output=features.pooler_output[items], deepstack_features=deepstack)

    model.get_image_features = lambda *_, **__: part(slice(len(images)), slice(tokens))
    model.get_video_features = lambda *_, **__: part(slice(len(images), None), slice(tokens, None))
    try:
        return type(model).forward(model, *args, **shown, **kwargs)
    finally:
        del model.get_image_features, model.get_video_features
