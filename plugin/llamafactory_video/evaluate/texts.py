"""How like texts are: ROUGE-L and chrF, by well-kept libraries, with Chinese cut into characters."""

import functools
import unicodedata
from typing import Any


class _Tokens:
    """sacrebleu's cut: each Chinese character is a token, other text is cut at spaces and punctuation."""

    def __init__(self) -> None:
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

        self._cut = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        return self._cut(text.lower()).split()


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokens())


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge_l(right: str, said: str) -> float:
    """ROUGE-L, the F measure of the longest common sequence of tokens, in 0..1 (Lin 2004)."""
    return float(_rouge().score(right, said)["rougeL"].fmeasure)


def chrf(right: str, said: str) -> float:
    """chrF, the F2 of character n-grams, in 0..1 (Popović 2015)."""
    return float(_chrf().sentence_score(said, [right]).score) / 100 if said else 0.0


def normalised(text: str) -> str:
    """A text as it is compared: NFKC, lower case, spaces as one, without punctuation at its ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return text.strip(".,;:!?'\"。，；：！？“”‘’、()（）[]【】 ")
