"""How fast training goes: clips, tokens and model FLOPs a second, time spent waiting for data, memory."""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from ..families import family_of
from .flops import peak_flops, trained_modules, training_flops

_GIB = 2**30


class Throughput:
    """Figures of this process since the last reading. Nothing is asked of the device before they are read.

    Args:
        model: with Qwen3-VL's config.
        dtype: of the arithmetic; what this device can do in it is measured by a matrix product.

    Attributes:
        waited: seconds spent waiting for data.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._config = device, model.config
        self._trains = trained_modules(model.named_parameters())
        self._counts_flops = family_of(model.config).counts_flops
        self._peak = peak_flops(device, dtype)
        self._reset()

    def _reset(self) -> None:
        self._since: float | None = None
        self.waited = 0.0
        self._clips = self._tokens = self._flops = 0

    def start(self) -> None:
        """The clock runs from here; it stands from `read` until then, so saving and evaluation do not count."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, counts: dict[str, Any]) -> None:
        """Count a micro-batch.

        Args:
            counts: `clips`, how many; `lengths`, of its samples in tokens, (n,); `grids`, (t, h, w) of all that
                the vision tower sees, (m, 3).
        """
        self._clips += counts["clips"]
        self._tokens += sum(counts["lengths"])
        if self._counts_flops:
            self._flops += training_flops(self._config, counts["lengths"], counts["grids"], self._trains)

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Figures of all processes together; starts anew.

        Args:
            gather: lays the tensors of all processes end to end.

        Returns:
            `clips_per_second` and `tokens_per_second` of all processes, padding not counted; `mfu`, the share of what
            the device can do that went into the model's own arithmetic (recomputation not counted; not known of models
            with experts); `data_wait`, the
            share of the time spent waiting for data; `memory_gib`, the most that PyTorch has held on a device so far,
            or the process on a CPU.
        """
        seconds = time.perf_counter() - self._since
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_reserved(self._device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        own = [self._clips, self._tokens, self._flops, seconds, self.waited, memory]
        all_own = gather(torch.tensor(own, dtype=torch.float64, device=self._device)).view(-1, len(own)).cpu()
        clips, tokens, flops, seconds, waited, memory = all_own.unbind(1)
        self._reset()
        utilisation = {"mfu": (flops.mean() / seconds.max()).item() / self._peak} if self._counts_flops else {}
        return {
            "clips_per_second": (clips.sum() / seconds.max()).item(),
            "tokens_per_second": (tokens.sum() / seconds.max()).item(),
            **utilisation,
            "data_wait": (waited / seconds).mean().item(),
            "memory_gib": memory.max().item() / _GIB,
        }
