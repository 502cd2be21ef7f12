"""What differs between families of models: a new one is a new entry of `FAMILIES`."""

from dataclasses import dataclass
from typing import Any

# The modules that are frozen, and have learning rates, by themselves, in the order of an optimizer's groups; the first
# is the one whose rate the Trainer logs as learning_rate.
MODULES = ("language_model", "vision_tower", "mm_projector")
ANSWER_START = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Family:
    """One family, as transformers and LLaMA-Factory know it.

    Attributes:
        model_type: of its config.
        core: class of the module whose `forward` takes patches and text together.
        projector, vision: how names of parameters begin that belong to the projector, and to the vision tower else.
        answer_start, thinking_start: what its chat template writes where an Instruct and a Thinking model are to speak.
        vision_start, vision_end, image_pad, video_pad: tokens that mark what is shown.
        counts_flops: whether `train.flops` knows its arithmetic.
        packs: whether samples packed into one row do not see each other.
    """

    model_type: str
    core: str
    projector: tuple[str, ...] = ("visual.merger", "visual.deepstack_merger_list")
    vision: tuple[str, ...] = ("visual.pos_embed", "visual.patch_embed", "visual.blocks")
    answer_start: str = ANSWER_START
    thinking_start: str = ANSWER_START + "<think>\n"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"
    counts_flops: bool = True
    packs: bool = True


QWEN3_VL = Family("qwen3_vl", "Qwen3VLModel")
# Which experts a token goes to is known to the running model alone.
QWEN3_VL_MOE = Family("qwen3_vl_moe", "Qwen3VLMoeModel", counts_flops=False)
FAMILIES = {family.model_type: family for family in (QWEN3_VL, QWEN3_VL_MOE)}


def family_of(config: Any) -> Family:
    """The family of a model, by its config.

    Raises:
        ValueError: if it is of none that is known here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"model_type {config.model_type} is not supported; known are {', '.join(FAMILIES)}")
    return family


def module_of(name: str) -> str:
    """Which of `MODULES` a parameter belongs to, by its name, as in Qwen's official trainer."""
    if "merger" in name:
        return "mm_projector"
    return "vision_tower" if "visual" in name else "language_model"
