"""Learning rates by module: parameter groups as in Qwen's official trainer.

The projector is what has "merger" in its name (`visual.merger` and the three `visual.deepstack_merger_list`), the
vision tower what else has "visual", the language model all the rest. Unlike there, each rate works without the other.
"""

from collections.abc import Iterable
from typing import Any

import torch

# In the order of the groups; the first is the one whose rate the Trainer logs as learning_rate.
MODULES = ("language_model", "vision_tower", "mm_projector")


def module_of(name: str) -> str:
    """Which of `MODULES` a parameter belongs to, by its name."""
    if "merger" in name:
        return "mm_projector"
    return "vision_tower" if "visual" in name else "language_model"


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    decay_names: Iterable[str],
    rates: dict[str, float],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: three modules, each with and without weight decay; empty ones left out.

    Args:
        named_parameters: of the whole model; frozen ones are passed over.
        decay_names: parameters with weight decay (no biases, no norms).
        rates: learning rate of each module.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`, such as "vision_tower" or "vision_tower_no_decay".
    """
    decay_names = set(decay_names)
    groups: dict[str, dict[str, Any]] = {}
    for module in MODULES:
        for suffix, decay in (("", weight_decay), ("_no_decay", 0.0)):
            name = module + suffix
            groups[name] = {"params": [], "lr": rates[module], "weight_decay": decay, "name": name}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[module_of(name) + ("" if name in decay_names else "_no_decay")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """The groups as a table for the log."""
    # DeepSpeed ZeRO-3 leaves an empty parameter on each rank, with its whole size beside it.
    sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in group["params"]) for group in groups]
    rows = [
        f"  {group['name']:<24} {size:>14,} parameters   "
        f"learning rate {group['lr']:<8g} weight decay {group['weight_decay']:g}"
        for group, size in zip(groups, sizes, strict=True)
    ]
    return "Optimizer groups:\n" + "\n".join(rows)
