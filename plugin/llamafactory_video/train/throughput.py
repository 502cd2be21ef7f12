"""How fast training goes: clips, tokens and model FLOPs a second, time spent waiting for data, memory."""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

_GIB = 2**30


class Throughput:
    """Figures of this process since the last reading. Nothing is asked of the device before they are read.

    Attributes:
        waited: seconds spent waiting for data.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._since: float | None = None
        self.waited = 0.0
        self._clips = 0
        self._tokens: list[torch.Tensor] = []

    def start(self) -> None:
        """The clock runs from here; it stands from `read` until then, so saving and evaluation do not count."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, inputs: dict[str, Any], clips: int) -> None:
        """Count a micro-batch.

        Args:
            inputs: what the model gets.
            clips: how many clips it shows.
        """
        self._clips += clips
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        self._tokens.append(mask.sum(1) if mask is not None and mask.dim() == 2 else ids.new_tensor([ids.shape[1]]))

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Figures of all processes together; starts anew.

        Args:
            gather: lays the tensors of all processes end to end.
        """
        tokens = int(torch.cat(self._tokens).sum())
        seconds = time.perf_counter() - self._since
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_reserved(self._device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        own = torch.tensor([self._clips, tokens, seconds, self.waited, memory], dtype=torch.float64)
        clips, tokens, seconds, waited, memory = gather(own.to(self._device)).view(-1, len(own)).cpu().unbind(1)
        self._reset()
        return {
            "clips_per_second": (clips.sum() / seconds.max()).item(),
            "tokens_per_second": (tokens.sum() / seconds.max()).item(),
            "data_wait": (waited / seconds).mean().item(),
            "memory_gib": memory.max().item() / _GIB,
        }
