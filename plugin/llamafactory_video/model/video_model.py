"""A model that is asked about clips, pictures and texts: by notebooks, services and `lmf-video infer`.

What it is shown of a clip is what training showed (`video.contract`), and its prompts are those of training.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..media import Conversation
from ..prompt.encoder import Encoder, Sample
from ..prompt.pixels import token_type_ids
from ..records.question import question
from ..records.report import DatasetError
from ..video.reader import DecodedClip
from ..video.threads import usable_cores
from .decoding import GREEDY, Answer, Decoding, OutOfMemory, Pieces, Stopped, answer_ends, cut_at
from .flat import run_flat
from .loading import load_model
from .seen import SeenMedia

# All of torch's but cuDNN's, which takes a tenth of a second for each length that it meets for the first time.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_AT_ONCE = 64  # questions, on a GPU: writing a token for many takes little longer than for one
_READERS = 16  # processes that read clips, at most
_SORTED = 16  # batches whose questions are sorted by length


class _Questions(Dataset):
    """Questions, read when they are taken."""

    def __init__(self, questions: list[tuple[Conversation, Sample]], load: Callable[..., Any]) -> None:
        self.questions, self.load = questions, load

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> Any:
        return self.load(*self.questions[number])


def _as_it_is(item: Any) -> Any:
    return item


class VideoModel:
    """A model with its processor, made by `load`. Several threads may ask it; they are answered one after another.

    Attributes:
        model: transformers' model.
        encoder: makes prompts.
    """

    def __init__(self, model: Any, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.processor, self.tokenizer = encoder.processor, encoder.tokenizer
        self._ends = answer_ends(self.tokenizer)
        self._grammars: Any = None  # of schemas, made when one is asked for
        self._lock = threading.Lock()
        self._is_warm = False
        base = next(module for module in model.modules() if "visual" in dict(module.named_children()))
        run_flat(base)
        self._seen = SeenMedia(base, self.processor, encoder.reader.sampling)

    def hold(self, rows: Sequence[Any], decoding: Decoding) -> LogitsProcessorList:
        """What holds the answers of a batch to `decoding.schema`, for transformers' `generate`.

        Args:
            rows: of the batch.

        Raises:
            SchemaError: a ValueError, if answers cannot be held to it.
        """
        if decoding.schema is None:
            return LogitsProcessorList()
        from .constrained import Grammars, JsonAnswers

        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self._ends)
        grammar = self._grammars.of(decoding.schema)
        return LogitsProcessorList([JsonAnswers([grammar] * max(1, len(rows)), decoding.max_new_tokens)])

    @classmethod
    def load(cls, model: str, adapter: str | Sequence[str] | None = None, **options: Any) -> "VideoModel":
        """Load a model, and adapters onto it.

        Args:
            model: folder of a model or of an adapter, or the name of a model on the hub.
            adapter: folder of an adapter, or several, which are merged in turn.
            options: see `load_model`: `dtype`, `load_in_4bit`, `device`, `video_cache`, `remote_media`, `sampled_as`, `log`, and how clips are sampled,
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
        decoding: Decoding = GREEDY,
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

    def stream(self, conversation: Conversation, decoding: Decoding = GREEDY) -> Iterator[str]:
        """The answer to a question in pieces, as they are written; raises as `ask` does."""
        loaded, pieces = self.encoder.load(conversation), SimpleQueue()
        stopped, failed = threading.Event(), []

        def write() -> None:
            try:
                self.answer([loaded], decoding, stopped, pieces.put)
            except Exception as error:  # raised where the answer is read
                failed.append(error)
            pieces.put(None)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from iter(pieces.get, None)
        finally:
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]

    def ask_many(
        self,
        conversations: Sequence[Conversation],
        decoding: Decoding = GREEDY,
        batch_size: int | None = None,
        log: Callable[[str], None] = print,
    ) -> Iterator[tuple[int, str | Exception]]:
        """Answers to many questions, each with the number of its question, in the order in which they are done.

        Clips are read ahead by processes; questions of similar length are answered together, by fewer at once where memory
        does not last. What cannot be asked is given as the error in its place.

        Args:
            batch_size: questions that are answered at once, at most; None: as many as memory has room for.
            log: takes a line for the person who runs this.
        """
        most = batch_size or (_AT_ONCE if self.model.device.type == "cuda" else 8)
        window = most * _SORTED
        for begin in range(0, len(conversations), window):
            asked = dict(enumerate(conversations[begin : begin + window], start=begin))
            with ThreadPoolExecutor(4) as pool:
                samples = dict(zip(asked, pool.map(self._encode, asked.values()), strict=True))
            yield from ((i, sample) for i, sample in samples.items() if isinstance(sample, Exception))
            order = [i for i, sample in samples.items() if not isinstance(sample, Exception)]
            order.sort(key=lambda i: len(samples[i].ids), reverse=True)  # what may be too much comes first
            reading = iter(self._reading([(asked[i], samples[i]) for i in order], most))
            self._warm_up()
            loaded: dict[int, Any] = {}
            while order:
                room = most if batch_size else self._fitting(len(samples[order[0]].ids), most, decoding)
                chosen = order[:room]
                loaded |= {i: next(reading) for i in chosen if i not in loaded}
                answers = {i: loaded[i] for i in chosen if isinstance(loaded[i], Exception)}
                right = {i: loaded[i] for i in chosen if i not in answers}
                try:
                    if right:
                        written = self.answer(list(right.values()), decoding)
                        answers |= {i: answer.text for i, answer in zip(right, written, strict=True)}
                except OutOfMemory as error:
                    if len(right) > 1:
                        most = len(right) // 2
                        log(f"No memory for {len(right)} questions at once; from here on there are {most}.")
                        continue
                    answers |= dict.fromkeys(right, error)
                order = order[len(chosen) :]
                for i in chosen:
                    del loaded[i]
                yield from answers.items()

    def _warm_up(self) -> None:
        """Have the GPU load what it writes answers with, which takes seconds, while the first clips are read."""
        if self.model.device.type == "cuda" and not self._is_warm:
            self._is_warm = True
            ids = torch.full((8, 64), self.tokenizer.pad_token_id, device=self.model.device)
            config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=self.tokenizer.pad_token_id)
            with self._lock, torch.inference_mode(), sdpa_kernel(_KERNELS):
                self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def _reading(self, questions: list[tuple[Conversation, Sample]], ahead: int) -> Iterable[Any]:
        """What `_load` gives of questions, in order, read ahead by processes: threads would wait for each other, and for Python."""
        workers = min(usable_cores(), _READERS, len(questions)) if len(questions) > 1 and hasattr(os, "fork") else 0
        options: dict[str, Any] = {}
        if workers:  # forks: they need nothing of the model, and scripts without a main guard may ask too
            options = {"prefetch_factor": max(2, math.ceil(ahead / workers)), "multiprocessing_context": "fork"}
        items = _Questions(questions, self._load)
        return DataLoader(items, batch_size=None, num_workers=workers, collate_fn=_as_it_is, **options)

    def _encode(self, conversation: Conversation) -> Sample | Exception:
        try:
            return self.encoder.encode(conversation)
        except (DatasetError, ValueError, OSError) as error:
            return error

    def _load(self, conversation: Conversation, sample: Sample) -> tuple[Sample, list[DecodedClip]] | Exception:
        try:
            return self.encoder.load(conversation, sample)
        except (DatasetError, ValueError, OSError) as error:
            return error

    def _fitting(self, tokens: int, most: int, decoding: Decoding) -> int:
        """How many questions of so many tokens the device has room for at once, estimated on the safe side."""
        if self.model.device.type != "cuda":
            return most
        text, size = self.model.config.get_text_config(), self.model.dtype.itemsize
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * size
        activations = (4 * text.intermediate_size + 8 * text.hidden_size) * size
        each = (tokens + decoding.max_new_tokens) * cached + tokens * activations + 16 * text.vocab_size
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(1, min(most, int(free * 0.7 / each)))

    def answer(
        self,
        loaded: Sequence[tuple[Sample, list[DecodedClip]]],
        decoding: Decoding = GREEDY,
        stopped: threading.Event | None = None,
        say: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """The answers to questions that are asked at once.

        Args:
            loaded: what `encoder.load` makes of questions.
            stopped: ends answers when it is set.
            say: takes the pieces of the one answer as they are written.

        Raises:
            OutOfMemory: if the device has no room for them.
            SchemaError: if answers cannot be held to the schema.
        """
        draws = decoding.temperature > 0
        drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=draws,
            repetition_penalty=decoding.repetition_penalty,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **(drawn if draws else {}),
        )
        options: dict[str, Any] = {"logits_processor": self.hold(loaded, decoding)}
        events = [] if stopped is None else [stopped]
        if say is not None:
            options["streamer"] = Pieces(self.tokenizer, say, decoding.stop)
            events.append(options["streamer"].ended)
        elif decoding.stop:
            options |= {"stop_strings": list(decoding.stop), "tokenizer": self.tokenizer}
        options["stopping_criteria"] = StoppingCriteriaList([Stopped(*events)] if events else [])
        ids, mask = self._padded(loaded)
        try:
            with self._lock, torch.inference_mode(), sdpa_kernel(_KERNELS), self._shown(loaded) as shown:
                if decoding.seed is not None:
                    torch.manual_seed(decoding.seed)
                inputs = {"input_ids": ids, "attention_mask": mask, **shown}
                inputs["mm_token_type_ids"] = token_type_ids(ids, self.processor)
                inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
                written = self.model.generate(**inputs, generation_config=config, **options)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            tokens = max(len(sample.ids) for sample, _ in loaded)
            visual = max(self.encoder.visual_tokens(sample.ids) for sample, _ in loaded)
            sampling = self.encoder.reader.sampling
            limits = {"video_max_pixels": sampling.max_pixels, "video_max_frames": sampling.max_frames}
            lower = [f"lower {name} from {value} to {value // 2}" for name, value in limits.items() if value]
            raise OutOfMemory(
                f"no memory for a question of {tokens} tokens, {visual} of them visual; {', or '.join(lower)}, or load the "
                "model in 4 bits, or in bfloat16 if it is in float32"
            ) from error
        return [
            self._read(row, sample, decoding)
            for row, (sample, _) in zip(written[:, ids.shape[1] :].tolist(), loaded, strict=True)
        ]

    def _padded(self, loaded: Sequence[tuple[Sample, list[DecodedClip]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of a batch, padded on the left, and which of their tokens are real, (batch, tokens) both."""
        longest = max(len(sample.ids) for sample, _ in loaded)
        ids = torch.full((len(loaded), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (sample, _) in enumerate(loaded):
            ids[row, longest - len(sample.ids) :] = torch.tensor(sample.ids)
            mask[row, longest - len(sample.ids) :] = 1
        return ids, mask

    def _shown(self, loaded: Sequence[tuple[Sample, list[DecodedClip]]]) -> Any:
        images = [image for sample, _ in loaded for image in sample.images]
        return self._seen.shown(images, [clip for _, decoded in loaded for clip in decoded])

    def _read(self, row: Sequence[int], sample: Sample, decoding: Decoding) -> Answer:
        """An answer from the tokens that were written."""
        ended = next((at for at, token in enumerate(row) if token in self._ends), None)
        tokens = len(row) if ended is None else ended + 1
        text = self.tokenizer.decode(row[:tokens], skip_special_tokens=True)
        cut = cut_at(text, decoding.stop)
        return Answer(cut, tokens, len(sample.ids), ended is not None or cut != text)
