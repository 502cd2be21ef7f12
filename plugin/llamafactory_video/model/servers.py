"""What vLLM and SGLang need so that a model is shown there what training showed it, and what they cannot do.

As their code reads in the releases that tests/test_servers.py runs: vLLM 0.33.0 (`multimodal/video.py`,
`model_executor/models/qwen3_vl.py`) and SGLang 0.5.23 (`srt/multimodal/processors/qwen_vl.py`).
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..families import QWEN3_VL
from ..video.contract import Contract

SERVERS = ("vllm", "sglang")
TICKS = 1_000_000  # a second; frames that are sent one by one have times in these
_MOST_FRAMES, _MOST_FPS = 768, 30  # which vLLM samples of a clip


@dataclass(frozen=True)
class Serving:
    """How a server is started for a model, and what it is worth.

    Attributes:
        command: words.
        exact: what is shown exactly as training showed it.
        limits: what is not, and the way round it; a sentence each.
    """

    command: tuple[str, ...]
    exact: str
    limits: tuple[str, ...]

    @property
    def line(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)


def bare_template(chat_template: str) -> str:
    """A chat template whose clips are their mark alone.

    From transformers 5.10 on, its processor leaves the marks around a clip's mark where they are, and writes those of each
    time inside them; before, and in training, it put them in their place.
    """
    family = QWEN3_VL
    return chat_template.replace(family.vision_start + family.video_pad + family.vision_end, family.video_pad)


def template_file(server: str) -> str:
    """The name of that template in the model's folder."""
    return f"{server}_chat_template.jinja"


def serving(server: str, folder: Path, contract: Contract) -> Serving:
    """How a server is started with the model of a folder.

    Args:
        server: one of `SERVERS`.
        contract: how the model's clips are sampled.
    """
    return (_vllm if server == "vllm" else _sglang)(str(folder), contract)


def _vllm(folder: str, contract: Contract) -> Serving:
    clips = contract.clips
    media = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames, "num_frames": -1}
    samples = clips.dialect == "qwen_finetune" and clips.max_frames <= _MOST_FRAMES and clips.fps <= _MOST_FPS
    client = "send frames: `lmf-video infer --model http://…/v1 --send frames --sampled-as FOLDER`, or vllm_client.py"
    limits = [
        "Clips of a variable frame rate are told the times of an average rate. The way round: " + client + ".",
        "`start`, `end` and other settings of a clip are not known to it. The way round: the same.",
        "Frames and their times can be sent of one clip in a question. It takes them for --trust-request-mm-kwargs; leave that "
        "out where strangers reach the server.",
    ]
    exact = "Frames that a client sends: ids, grid, times and pixels."
    if samples:
        exact += (
            " Whole clips of a constant rate: ids, grid and times; pixels within what OpenCV's decoder differs by."
        )
        media_words = ("--media-io-kwargs", json.dumps({"video": media}))
    else:
        limits.insert(
            0, f"Sampling as {clips.dialect} does is not known to it, so whole clips are shown otherwise: {client}."
        )
        media_words = ()
    command = (
        *("vllm", "serve", folder, "--chat-template", f"{folder}/{template_file('vllm')}"),
        *media_words,
        "--trust-request-mm-kwargs",
    )
    return Serving(command, exact, tuple(limits))


def _sglang(folder: str, contract: Contract) -> Serving:
    clips = contract.clips
    config = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames}
    limits = (
        "Over HTTP it takes frames by rounding down, not to the nearest, an even number of them, and resizes them to "
        "multiples of 28 pixels before the model's processor resizes them again: what is shown is near to training, and not "
        "equal. The way round: sglang_client.py, where SGLang's engine runs inside Python and takes what this project's "
        "encoder makes.",
        "No budget for a whole clip and no true times of variable rates reach it over HTTP. The way round: the same.",
        "Neither frames nor times can be sent over HTTP; for that, vLLM or `llamafactory-cli api`.",
    )
    command = (
        *("python", "-m", "sglang.launch_server", "--model-path", folder),
        *("--chat-template", f"{folder}/{template_file('sglang')}"),
        *("--mm-process-config", json.dumps({"video": config})),
    )
    return Serving(command, "In Python, by sglang_client.py: ids, grid, times and pixels.", limits)


def ticks_of(times: list[float], size: int) -> list[int]:
    """Whole ticks for the times of frames, such that a server that halves and rounds them tells what training told.

    Args:
        times: seconds, (T,), T a multiple of `size`.
        size: frames that have one time together.
    """
    ticks = [round(time * TICKS) for time in times]
    for first in range(0, len(times), size):
        last = first + size - 1
        wanted = f"{(times[first] + times[last]) / 2:.1f}"
        for step in (0, 1, -1, 2, -2):  # at a tie, as 0.05 s, a millionth of a second decides
            if f"{((ticks[first] + step) / TICKS + (ticks[last] + step) / TICKS) / 2:.1f}" == wanted:
                ticks[first : last + 1] = [max(0, tick + step) for tick in ticks[first : last + 1]]
                break
    return ticks
