"""Score short answers by ROUGE-L, with the package rouge-score where it is installed."""

import unicodedata
from collections.abc import Sequence

MOST_WORDS = 30
"""Of a gold answer that is scored. Long free answers share a sequence of common words whatever they say."""

NOT_INSTALLED = "rouge-score is not installed: pip install 'rouge-score>=0.1.2'"
NO_SHORT_ANSWER = f"no gold answer has 1 to {MOST_WORDS} words in a script with spaces between words"

_SPACELESS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0x20000, 0x3FFFF),
)
"""Thai and Lao, Burmese, Khmer, Japanese, Chinese: no space between words, so that a sentence would count as one."""


def rouge_l(texts: Sequence[str], gold: Sequence[str]) -> list[float | None]:
    """Return the F1 of each answer by ROUGE-L, 0 to 1; None where the gold one has no words or more than MOST_WORDS, or
    a script without spaces between them (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries).

    Raises: ImportError when rouge-score is not installed."""
    scored = [_is_scored(right) for right in gold]
    if not any(scored):
        return [None] * len(scored)
    from rouge_score.rouge_scorer import RougeScorer  # it takes seconds, for the stemmers of nltk

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        float(scorer.score(right, text)["rougeL"].fmeasure) if is_scored else None
        for text, right, is_scored in zip(texts, gold, scored, strict=True)
    ]


class _Words:
    """A tokenizer as rouge-score takes it. Its own keeps ASCII letters only."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words in lower case: letters, marks and digits of every script."""
        folded = unicodedata.normalize("NFKC", text).casefold()
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()


def _is_scored(gold: str) -> bool:
    words = len(_Words().tokenize(gold))
    spaceless = any(low <= ord(c) <= high for c in gold for low, high in _SPACELESS)
    return 1 <= words <= MOST_WORDS and not spaceless
