"""Answers while a model trains: a sample of the evaluation set is answered and judged at each evaluation, as `lmf-video eval` does."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ..evaluate.fields import fields_of
from ..evaluate.measures import judge, read_label
from ..media import Conversation


@dataclass(frozen=True)
class AnswersWhileTraining:
    """What `eval_generate` asks for.

    Args:
        count: records that are answered, the same ones each time.
        batch_size: answered at once by a process.
        max_new_tokens: the most tokens of an answer.
        conversations: of an evaluation set.
        batch_of: conversations -> a batch of prompts as the collator pads them on the left, without the last answers.
        decode: token ids -> text.
    """

    count: int
    batch_size: int
    max_new_tokens: int
    conversations: Callable[[Any], Sequence[Conversation]]
    batch_of: Callable[[Any, Sequence[Conversation]], dict[str, Any]]
    decode: Callable[[Sequence[int]], str]

    def measure(self, trainer: Any, dataset: Any, prefix: str) -> dict[str, float]:
        """The measures of the answers, as `eval_tags_f1` and the like; on all processes the same.

        Args:
            trainer: a Seq2SeqTrainer, in whose way answers are generated, also where weights are spread over processes.
            dataset: the evaluation set.
            prefix: of the names.
        """
        asked = self.conversations(dataset)
        numbers = sorted(random.Random(0).sample(range(len(asked)), min(self.count, len(asked))))
        questions = [asked[number] for number in numbers]
        texts = self._answers(trainer, dataset, questions)
        labels = [read_label(question.messages[-1][1]) for question in questions]
        fields = fields_of(labels)
        everyone = np.ones((1, len(labels)))
        figures = judge(labels, texts, fields).figures
        values = {name: float(figure.values(everyone)[0]) for name, figure in figures.items()}
        return {
            f"{prefix}_{name.replace('.', '_')}": round(value, 6)
            for name, value in values.items()
            if not np.isnan(value)
        }

    def _answers(self, trainer: Any, dataset: Any, questions: Sequence[Conversation]) -> list[str]:
        rank, processes = trainer.args.process_index, trainer.args.world_size
        mine = list(range(rank, len(questions), processes))
        # All processes do as many batches, since each step may need the weights of all; what is too much is left out.
        rounds = -(-len(questions) // (processes * self.batch_size))
        wanted = [*mine, *[len(questions) - 1] * (rounds * self.batch_size - len(mine))]
        found: dict[int, str] = {}
        with _as_it_was(trainer):
            trainer.model.eval()
            drawn = dict.fromkeys(("temperature", "top_p", "top_k"))
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "use_cache": True, **drawn}
            trainer._gen_kwargs = {**trainer._gen_kwargs, **options}
            bar = tqdm(range(0, len(wanted), self.batch_size), "Answering", disable=rank > 0, leave=False)
            for at in bar:
                numbers = wanted[at : at + self.batch_size]
                batch = self.batch_of(dataset, [questions[number] for number in numbers])
                prompt = batch["input_ids"].shape[1]
                _, tokens, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
                for number, row in zip(numbers, tokens[:, prompt:].tolist(), strict=True):
                    found[number] = self.decode(row)
        if processes > 1:
            parts: list[Any] = [None] * processes
            dist.all_gather_object(parts, found)
            found = {number: text for part in parts for number, text in part.items()}
        return [found[number] for number in range(len(questions))]


@contextlib.contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """What answering changes is as before: nothing of it may be seen in training."""
    states = random.getstate(), np.random.get_state()
    generates, kwargs, training = trainer.args.predict_with_generate, trainer._gen_kwargs, trainer.model.training
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        trainer.args.predict_with_generate = True
        try:
            yield
        finally:
            trainer.args.predict_with_generate, trainer._gen_kwargs = generates, kwargs
            trainer.model.train(training)
            random.setstate(states[0])
            np.random.set_state(states[1])
