"""Proof at the start of a run that everything which should learn gets a gradient."""

import re
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..families import module_of

MISSING, ZERO = -1.0, 0.0
# What FSDP, activation checkpointing and compilation put into names once the audit has begun.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class GradientError(RuntimeError):
    """Modules that should learn and cannot."""


class GradientAudit:
    """The largest gradient of every layer with trainable parameters, taken as it is computed.

    A layer is the module that holds the parameter; with LoRA, the module that is adapted: one of an adapter's two
    matrices starts at zero, so in the first step the other has no gradient, and that is right.

    Args:
        named_parameters: of the whole model.
        from_hooks: take gradients on their way to the parameters, where an engine may take them away afterwards
            (DeepSpeed). Otherwise `take` is called when they are there (FSDP2, which trains other tensors under
            the same names).

    Attributes:
        pending: layers that are not judged yet.
        saw_vision: set it when a micro-batch shows a clip or picture; without one anywhere, vision is judged in a later
            step.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], from_hooks: bool) -> None:
        trained = [(_layer(name), p) for name, p in named_parameters if p.requires_grad]
        self._largest: dict[str, torch.Tensor] = {}
        self.saw_vision = False
        self.pending = list(dict.fromkeys(layer for layer, _ in trained))
        self._handles = [
            (layer, p.register_hook(lambda gradient, layer=layer: self._note(layer, gradient)))
            for layer, p in trained
            if from_hooks
        ]

    def _note(self, layer: str, gradient: torch.Tensor) -> None:
        largest = torch.nan_to_num(gradient.detach().abs().max().float(), nan=torch.inf, posinf=torch.inf)
        before = self._largest.get(layer)
        self._largest[layer] = largest if before is None else torch.maximum(before, largest)

    def take(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Take the gradients that the parameters hold now; of sharded ones, this process's part."""
        for name, parameter in named_parameters:
            if parameter.grad is not None:
                gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                if gradient.numel():
                    self._note(_layer(name), gradient)

    def check(self, device: torch.device, scaled: bool = False, learns: bool = True) -> dict[str, list[str]]:
        """Judge the layers that this step can tell about, on all processes together, and forget its gradients.

        Args:
            device: where the processes' backend works.
            scaled: with fp16 loss scaling, the first gradients may overflow; they are judged in a later step.
            learns: whether the step has a supervised token; if it has none on any process, a later one is judged.

        Returns:
            Layers by fault: "missing", "zero", "not finite"; empty if all is well.
        """
        values = [self._largest.get(layer) for layer in self.pending]
        numbers = torch.stack(
            [torch.tensor(float(seen), device=device) for seen in (self.saw_vision, learns)]
            + [torch.tensor(MISSING, device=device) if v is None else v.to(device) for v in values]
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        saw_vision, learns, *found = numbers.tolist()
        self._largest.clear()
        self.saw_vision = False
        if not learns:
            return {}
        faults: dict[str, list[str]] = {"missing": [], "zero": [], "not finite": []}
        later = []
        for layer, largest in zip(self.pending, found, strict=True):
            if (not saw_vision and module_of(layer) != "language_model") or (scaled and largest == torch.inf):
                later.append(layer)
            elif largest == MISSING:
                faults["missing"].append(layer)
            elif largest == ZERO:
                faults["zero"].append(layer)
            elif largest == torch.inf:
                faults["not finite"].append(layer)
        self.pending = later
        for layer, handle in self._handles:
            if layer not in later:
                handle.remove()
        return {fault: layers for fault, layers in faults.items() if layers}


def describe_faults(faults: dict[str, list[str]]) -> str:
    """One line a kind of fault; layers that differ in their number alone are told together."""
    lines = []
    for fault, layers in faults.items():
        alike = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", layer) for layer in layers)
        names = [f"{name} ({count} layers)" if count > 1 else name for name, count in alike.items()]
        lines.append(f"  gradient {fault}: {', '.join(names)}")
    return "\n".join(lines)


def _layer(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
