"""What lmms-eval reads of us when it starts, by the entry point `lmms_eval.models`; the model is imported when it is asked for."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("llamafactory_video", chat_class_path="llamafactory_video.lmms.model.VideoLmms")
