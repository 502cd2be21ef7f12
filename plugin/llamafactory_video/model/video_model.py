"""A model that is asked about clips, pictures and texts: by notebooks, services and `lmf-video infer`.

What it is shown of a clip is what training showed (`video.contract`), and its prompts are those of training.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..media import Conversation
from ..prompt.encoder import Encoder, Sample
from ..prompt.pixels import token_type_ids, vision_inputs
from ..records.question import question
from ..records.report import DatasetError
from ..video.reader import DecodedClip
from ..video.threads import usable_cores
from .loading import load_model

_AHEAD = 4  # batches whose clips are read while answers are written


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0: the likeliest token each time; above, drawn at random.
        top_p, top_k: from the likeliest tokens alone, by their share and number; 0: all, for `top_k`.
        repetition_penalty: above 1, tokens that were there become less likely.
        seed: of what is drawn; None: another each time.
        schema: a JSON Schema that answers are held to; None: any text.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")


class OutOfMemory(RuntimeError):
    """The device has no room for a question."""


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody reads any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Pieces(BaseStreamer):
    """The text of an answer as it is written, character by character.

    transformers' own streamers hold a word back until a space follows, and decode all of a line again at each token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoder = tokenizer, DecodeStream(skip_special_tokens=True)
        self.queue: SimpleQueue[str | None] = SimpleQueue()  # None: the end
        self.ids: list[int] | None = None
        self.said = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt
            self.ids = []
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            self._say(self.decoder.step(self.tokenizer.backend_tokenizer, token))

    def end(self) -> None:
        if self.ids:  # bytes that make no whole character may be left
            self._say(self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.said :])
        self.queue.put(None)

    def _say(self, piece: str | None) -> None:
        if piece:
            self.said += len(piece)
            self.queue.put(piece)


class VideoModel:
    """A model with its processor, made by `load`.

    Attributes:
        model: transformers' model.
        encoder: makes prompts.
    """

    def __init__(self, model: Any, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.processor, self.tokenizer = encoder.processor, encoder.tokenizer
        ends = {self.tokenizer.convert_tokens_to_ids("<|im_end|>"), self.tokenizer.eos_token_id}
        self._ends = sorted(end for end in ends if end is not None)
        self._grammars: Any = None  # of schemas, made when one is asked for

    def grammar(self, schema: dict[str, Any]) -> Any:
        """A JSON Schema compiled (`constrained.Grammar`).

        Raises:
            SchemaError: a ValueError, if answers cannot be held to it.
        """
        from .constrained import Grammars

        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self._ends)
        return self._grammars.of(schema)

    @classmethod
    def load(cls, model: str, adapter: str | Sequence[str] | None = None, **options: Any) -> "VideoModel":
        """Load a model, and adapters onto it.

        Args:
            model: folder of a model or of an adapter, or the name of a model on the hub.
            adapter: folder of an adapter, or several, which are merged in turn.
            options: see `load_model`: `dtype`, `load_in_4bit`, `device`, `video_cache`, `log`, and how clips are sampled,
                if not as the folder says: `video_sampling`, `video_fps` and the other keys of a recipe.

        Raises:
            ValueError: if there is no such folder, or none that this release can use.
        """
        adapters = [adapter] if isinstance(adapter, str) else list(adapter or ())
        return cls(*load_model(str(model), adapters, **options))

    def ask(
        self,
        prompt: str | Sequence[dict[str, Any]],
        video: Any = None,
        image: Any = None,
        system: str = "",
        decoding: Decoding = Decoding(),
    ) -> str:
        """The answer to one question; see `records.question.question` for what a question may be.

        Raises:
            ValueError: if the question is wrong, or something of it cannot be shown.
            OutOfMemory: naming what to lower.
        """
        _, answer = next(self.ask_many([question(prompt, video, image, system)], decoding))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stream(self, conversation: Conversation, decoding: Decoding = Decoding()) -> Iterator[str]:
        """The answer to a question in pieces, as they are written; raises as `ask` does."""
        loaded = self.encoder.load(conversation)
        pieces = _Pieces(self.tokenizer)
        stopped, failed = _Stopped(), []

        def write() -> None:
            try:
                self._generate([loaded], decoding, streamer=pieces, stopping_criteria=StoppingCriteriaList([stopped]))
            except Exception as error:  # raised where the answer is read
                failed.append(error)
                pieces.queue.put(None)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from iter(pieces.queue.get, None)
        finally:
            stopped.event.set()
            thread.join()
        if failed:
            raise failed[0]

    def ask_many(
        self,
        conversations: Sequence[Conversation],
        decoding: Decoding = Decoding(),
        batch_size: int = 8,
        log: Callable[[str], None] = print,
    ) -> Iterator[tuple[int, str | Exception]]:
        """Answers to many questions, each with the number of its question, in the order in which they are done.

        Clips are read ahead by threads; questions of similar length are answered together, by fewer at once where memory
        does not last. What cannot be asked is given as the error in its place.

        Args:
            batch_size: questions that are answered at once, at most.
            log: takes a line for the person who runs this.
        """
        if decoding.seed is not None:
            torch.manual_seed(decoding.seed)
        window = batch_size * _AHEAD
        parts = [range(at, min(at + window, len(conversations))) for at in range(0, len(conversations), window)]
        with ThreadPoolExecutor(min(usable_cores(), 16), "read clip") as pool:
            reading = [pool.submit(self._load, conversations[i]) for i in parts[0]] if parts else []
            for number, part in enumerate(parts):
                loaded = {i: future.result() for i, future in zip(part, reading, strict=True)}
                following = parts[number + 1] if number + 1 < len(parts) else ()
                reading = [pool.submit(self._load, conversations[i]) for i in following]
                yield from ((i, item) for i, item in loaded.items() if isinstance(item, Exception))
                waiting = [i for i, item in loaded.items() if not isinstance(item, Exception)]
                waiting.sort(key=lambda i: len(loaded[i][0].ids), reverse=True)  # what may be too much comes first
                while waiting:
                    chosen = waiting[:batch_size]
                    try:
                        answers = self._generate([loaded[i] for i in chosen], decoding)
                    except OutOfMemory as error:
                        if len(chosen) > 1:
                            batch_size = len(chosen) // 2
                            log(f"No memory for {len(chosen)} questions at once; from here on there are {batch_size}.")
                            continue
                        answers = [error]
                    waiting = waiting[len(chosen) :]
                    yield from zip(chosen, answers, strict=True)

    def _load(self, conversation: Conversation) -> tuple[Sample, list[DecodedClip]] | Exception:
        try:
            return self.encoder.load(conversation)
        except (DatasetError, ValueError, OSError) as error:
            return error

    def inputs(self, loaded: Sequence[tuple[Sample, list[DecodedClip]]]) -> dict[str, torch.Tensor]:
        """What transformers' model takes, prompts padded on the left."""
        longest = max(len(sample.ids) for sample, _ in loaded)
        ids = torch.full((len(loaded), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (sample, _) in enumerate(loaded):
            ids[row, longest - len(sample.ids) :] = torch.tensor(sample.ids)
            mask[row, longest - len(sample.ids) :] = 1
        images = [image for sample, _ in loaded for image in sample.images]
        clips = [clip for _, decoded in loaded for clip in decoded]
        shown = vision_inputs(images, clips, self.processor, self.encoder.reader.sampling)
        types = token_type_ids(ids, self.processor)
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **shown}
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _generate(
        self, loaded: Sequence[tuple[Sample, list[DecodedClip]]], decoding: Decoding, **options: Any
    ) -> list[str]:
        """The answers to questions that are asked at once.

        Raises:
            OutOfMemory: if the device has no room for them.
        """
        draws = decoding.temperature > 0
        drawn = (
            {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k} if draws else {}
        )
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=draws,
            repetition_penalty=decoding.repetition_penalty,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **drawn,
        )
        if decoding.schema is not None:
            from .constrained import JsonAnswers

            grammar = self.grammar(decoding.schema)
            held = JsonAnswers([grammar] * len(loaded), decoding.max_new_tokens)
            options["logits_processor"] = LogitsProcessorList([held])
        try:
            inputs = self.inputs(loaded)
            with torch.inference_mode():
                ids = self.model.generate(**inputs, generation_config=config, **options)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            tokens = max(len(sample.ids) for sample, _ in loaded)
            visual = max(self.encoder.visual_tokens(sample.ids) for sample, _ in loaded)
            raise OutOfMemory(
                f"no memory for a question of {tokens} tokens, {visual} of them visual. Lower video_max_pixels or "
                f"video_max_frames to half, load the model in 4 bits, or in bfloat16 if it is not"
            ) from error
        answers = ids[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)
