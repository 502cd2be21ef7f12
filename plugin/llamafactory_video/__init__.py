"""Fine-tune Qwen3-VL on video conversations with LLaMA-Factory.

Installed is enough: PyTorch calls `_autoload` at the end of every `import torch` (entry point group
`torch.backends`), in whatever process, and the finder below waits there for LLaMA-Factory's modules; host/places.py is
imported with the first of them. In a notebook that imported LLaMA-Factory before, `register()` does the same at once.

The finder is a few lines of our own because importing wrapt, which has the same, costs most of the 5 ms that
`import torch` may pay for us.
"""

import os
import sys

__version__ = "0.1.0"

DISABLE_VARIABLE = "LLAMAFACTORY_VIDEO_DISABLE"


class _Finder:
    """A meta path finder that lets the others find a module of LLaMA-Factory, and installs after it has run."""

    @staticmethod
    def find_spec(name, path, target=None):
        if not name.startswith("llamafactory."):
            return None
        from .host import places

        if name not in places.TABLE:
            return None
        finders = (finder for finder in sys.meta_path if finder is not _Finder)
        spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None:
            places.prepare()
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                places.install(module)

            spec.loader.exec_module = exec_module
        return spec


def _autoload() -> None:
    """Entry point. Every `import torch` pays for this."""
    disabled = os.environ.get(DISABLE_VARIABLE, "").lower() in ("1", "true", "yes", "on")
    if not disabled and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        program = (getattr(sys, "argv", None) or [""])[0]
        if "llamafactory" in program or os.path.basename(program).startswith("lmf"):
            from .host import start

            if start.is_command(program):
                start.begin(sys.argv)


def __getattr__(name: str):
    """What notebooks and services use, loaded when it is asked for."""
    if name in ("Decoding", "VideoModel", "question"):
        from .model import video_model

        return getattr(video_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Install the plugin into LLaMA-Factory, imported already or not. Doing it twice changes nothing.

    Raises:
        UnsupportedLlamaFactory: if LLaMA-Factory lacks a place that the plugin extends.
    """
    import llamafactory  # noqa: F401

    from .host import places

    places.prepare()
    _autoload()
    for name in places.TABLE:
        if name in sys.modules and name not in places.installed:
            places.install(sys.modules[name])
