"""`llamafactory-cli api`, served by `serve/` where the template is ours."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from ..serve.app import Settings, create_app
from ..serve.media import MediaAccess
from ..video.cache import GIB
from .core import replace_everywhere
from .keys import listed


def _settings(engine: Any) -> Settings:
    """What a server takes, by its recipe and by the variables that LLaMA-Factory knows."""
    keys, name = engine.model_args, os.environ.get("API_MODEL_NAME")
    folder = os.environ.get("SAFE_MEDIA_PATH")
    allowed = os.environ.get("ALLOW_LOCAL_FILES", "1").lower() in ("1", "true", "y")
    return Settings(
        name=name or Path(keys.model_name_or_path).name,
        is_strict=name is not None,
        key=os.environ.get("API_KEY"),
        most_upload=int(keys.api_max_upload_mb * (1 << 20)),
        most_visual_tokens=keys.api_max_visual_tokens,
        defaults=engine.decoding,
        media=MediaAccess(
            folder=Path(folder) if folder and allowed else None,
            hosts=listed(keys.api_allowed_hosts),
            most_bytes=int(keys.video_remote_gb * GIB),
            timeout=keys.video_timeout,
        ),
        root_path=os.environ.get("FASTAPI_ROOT_PATH", ""),
    )


def extend_api(app: ModuleType) -> None:
    """LLaMA-Factory's server logs whole uploads, breaks streams off and ignores what it does not know."""
    stock = app.create_app

    def create(chat_model: Any) -> Any:
        model = getattr(chat_model.engine, "video_model", None)
        return stock(chat_model) if model is None else create_app(model, _settings(chat_model.engine))

    replace_everywhere(app, "create_app", create)
