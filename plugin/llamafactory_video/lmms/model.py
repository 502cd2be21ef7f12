"""lmms-eval's `--model llamafactory_video`: clips sampled as training did, with their true times. Tried with lmms-eval 0.7.3."""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from ..model.decoding import Decoding
from ..model.video_model import VideoModel
from .messages import conversation_of, decoding_of


class VideoLmms(lmms):
    """A model as lmms-eval asks it.

    Args:
        pretrained: folder of a model or an adapter, or a name on the hub.
        batch_size: questions answered at once; "auto": as many as memory has room for.
        options: of `VideoModel.load`, such as dtype, load_in_4bit, video_fps.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = "auto", device: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        device = None if device in (None, "cuda") else device
        self.batch_size = None if batch_size == "auto" else int(batch_size)
        self.model = VideoModel.load(pretrained, device=device, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request; those that ask for the same way of answering are asked together."""
        answers: list[str] = [""] * len(requests)
        groups: dict[Decoding, list[int]] = {}
        conversations = []
        for number, request in enumerate(requests):
            _, doc_to_messages, options, doc, task, split = request.args
            conversations.append(conversation_of(doc_to_messages(self.task_dict[task][split][doc])))
            groups.setdefault(decoding_of(options), []).append(number)
        for decoding, numbers in groups.items():
            asked = [conversations[number] for number in numbers]
            for at, answer in self.model.ask_many(asked, decoding, self.batch_size):
                if isinstance(answer, Exception):
                    raise answer
                answers[numbers[at]] = answer
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Not there: answers are written, as they are where the model is used."""
        raise NotImplementedError(
            "llamafactory_video answers questions; choose tasks with output_type: generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Not there."""
        raise NotImplementedError("llamafactory_video answers one question at a time")
