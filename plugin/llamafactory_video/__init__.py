"""Fine-tune Qwen3-VL on video conversations with LLaMA-Factory.

Installed is enough: PyTorch calls `_autoload` at the end of every `import torch` (entry point group
`torch.backends`), in whatever process, and the plugin waits there for LLaMA-Factory to be imported. In a notebook
that imported LLaMA-Factory first, `llamafactory_video.register()` does the same at once.
"""

__version__ = "0.1.0"


def _autoload() -> None:
    """Entry point. Every `import torch` pays for this, so it imports nothing but the small file of hooks."""
    from .hooks import watch

    watch()


def register() -> None:
    """Install the plugin into LLaMA-Factory, imported already or not. Doing it twice changes nothing.

    Raises:
        UnsupportedLlamaFactory: if LLaMA-Factory lacks a place that the plugin extends.
    """
    from .hooks import install_now

    install_now()
