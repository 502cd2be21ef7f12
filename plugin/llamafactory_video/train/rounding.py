"""What 16-bit weights cannot move at their learning rate."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import SchedulerType

SAMPLE = 100_000  # weights looked at in each tensor, by `rounding_loss`


def bounds_by_module(training_args: Any, optimizer: torch.optim.Optimizer) -> None:
    """The lowest and highest rate of schedulers that take one for all groups: given for each, in proportion.

    The schedulers of other types multiply all rates by the same factor.
    """
    defaults = {
        # Both pass over changes below eps, 1e-8, which would stop a small rate before the others.
        "reduce_lr_on_plateau": {"eps": 0.0, "min_lr": 0.0},
        "greedy": {"eps": 0.0, "min_lr": 1e-3, "max_lr": 1.0},
    }.get(SchedulerType(training_args.lr_scheduler_type).value)
    if defaults is None:
        return
    options = {**defaults, **(training_args.lr_scheduler_kwargs or {})}
    for key in {"min_lr", "max_lr"} & options.keys():
        if isinstance(options[key], int | float):
            options[key] = [
                options[key] * float(group["lr"]) / training_args.learning_rate for group in optimizer.param_groups
            ]
    training_args.lr_scheduler_kwargs = options


def rounding_loss(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """For each module, the share of its weights of low precision that a step of its rate cannot move.

    A step below half the distance to the next number of the dtype is rounded away. Adam's steps are as long as the
    rate while a gradient keeps its sign, and shorter otherwise. At most about `SAMPLE` weights of a tensor are looked
    at; tensors that are spread over processes are passed over.

    Args:
        groups: of an optimizer, split by `split_groups`.
    """
    lost, seen = Counter(), Counter()
    for group in groups:
        for p in group["params"]:
            spread = isinstance(p, DTensor) or hasattr(p, "ds_id") or p.is_meta
            if (
                not p.requires_grad
                or group["lr"] == 0
                or p.dtype not in (torch.bfloat16, torch.float16)
                or spread
                or not p.numel()
            ):
                continue
            stride = -(-p.numel() // SAMPLE) | 1  # odd, so that a matrix is not looked at along one column
            weights = p.detach().flatten()[::stride].float()
            info = torch.finfo(p.dtype)
            # |w| = m * 2^e with m in [0.5, 1), so numbers around it are 2^(e - 1) * eps apart.
            spacing = torch.ldexp(torch.full_like(weights, info.eps), torch.frexp(weights).exponent - 1)
            spacing = spacing.clamp(min=info.smallest_normal * info.eps)
            share = (float(group["lr"]) < spacing / 2).float().mean().item()
            lost[group["module"]] += share * p.numel()
            seen[group["module"]] += p.numel()
    return {module: lost[module] / seen[module] for module in seen}


def check_rounding(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if more than half of a module's weights would stay where they are, rounded back at each step.

    Not asked of optimizers that round at random or carry what rounding loses, nor of SGD, whose steps are as long as
    the gradients.
    """
    if getattr(optimizer, "bf16_stochastic_round", False) or "SGD" in type(optimizer).__name__:
        return
    # optimi, where None means "for low precision", and torchdistx
    groups = [g for g in optimizer.param_groups if g.get("kahan_sum", False) is False]
    groups = [g for g in groups if not g.get("use_kahan_summation")]
    for module, share in rounding_loss(groups).items():
        if share > 0.5:
            rate = max(float(group["lr"]) for group in groups if group["module"] == module)
            raise ValueError(
                f"at its learning rate {rate:g}, {share:.0%} of the {module}'s weights cannot move: they are kept in "
                "16 bits, and a step smaller than half the distance to the next such number is rounded away. Use "
                "`pure_bf16: false` (weights in float32) or `optim: adamw_torch_8bit` (torchao, in the extra bf16; "
                "rounds bfloat16 at random, so that small steps add up)"
            )
