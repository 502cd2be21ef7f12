"""Names by which LLaMA-Factory knows the plugin, and how something of LLaMA-Factory's is replaced."""

import sys
from types import ModuleType
from typing import Any

TEMPLATE, THINKING_TEMPLATE, FORMATTING = "qwen3_vl_video", "qwen3_vl_video_thinking", "video_conversation"
SUPPORTED_VERSIONS = "0.9.5"


def is_ours(owner: Any) -> bool:
    """Whether a template's name, a template, or arguments of a run are those of a video template."""
    if isinstance(owner, str):
        return owner in (TEMPLATE, THINKING_TEMPLATE)
    return getattr(owner, "video_template", False)


class UnsupportedLlamaFactory(RuntimeError):
    """A place that the plugin extends is not in this LLaMA-Factory."""


def replace_everywhere(module: ModuleType, name: str, new: Any) -> None:
    """Set a name in its module and wherever else in LLaMA-Factory it was imported already."""
    old = getattr(module, name)
    setattr(module, name, new)
    for other_name, other in list(sys.modules.items()):
        if other_name.startswith("llamafactory.") and getattr(other, name, None) is old:
            setattr(other, name, new)
