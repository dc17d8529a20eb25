"""How much a policy repeats itself, from its answers alone. Words: what white space separates."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from alphaspin.foundation import rng

ORDER = 4
"""Longest n-grams of BLEU."""

REFERENCES = 100
"""Answers that each one is compared with: more of them have more in common with any text, so the
number is fixed to keep sets of different sizes comparable."""

Ngram = tuple[str, ...]


def ngrams(words: Sequence[str], n: int) -> Counter[Ngram]:
    """How often each run of n words occurs."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n: different n-grams of all texts over their number (Li et al., arXiv 1510.03055).

    It falls as more text is looked at: compare over equal numbers of prompts. None where no text
    has n words.
    """
    found = Counter[Ngram]()
    for text in texts:
        found.update(ngrams(text.split(), n))
    return len(found) / found.total() if found else None


def bleu(words: Sequence[str], most: Callable[[Ngram], int], lengths: Sequence[int]) -> float:
    """Sentence BLEU in [0, 1] as sacreBLEU defines it (Papineni et al., 2002; Post, 2018).

    Clipped precisions of 1- to 4-grams, or up to the sentence's length if that is less; their
    geometric mean times min(1, e^(1 - r/c)) with c the length and r that of the closest reference.
    The k-th precision that would be 0 is 1/(2^k · its n-grams) (Chen and Cherry, 2014, method 3).

    Args:
        words: of the sentence.
        most: how often an n-gram occurs in the reference that has it most often.
        lengths: of the references, in words.
    """
    logs: list[float] = []
    missing = 0
    for n in range(1, min(ORDER, len(words)) + 1):
        counts = ngrams(words, n)
        matches = sum(min(count, most(ngram)) for ngram, count in counts.items())
        missing += not matches
        logs.append(math.log((matches or 0.5**missing) / counts.total()))
    if missing == len(logs):
        return 0.0  # nothing in common, or no words
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - closest / len(words)))


def self_bleu(texts: Sequence[str], seed: int) -> float | None:
    """Mean BLEU of each text with others as references (Zhu et al., arXiv 1802.01886).

    1 where all say the same. The others are at most `REFERENCES` texts, a choice fixed by the seed,
    less the text itself. None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    split = [text.split() for text in texts]
    order = rng.generator(seed, 0, "self-bleu").permutation(len(texts))
    chosen = [int(i) for i in order[:REFERENCES]]
    # The largest count of an n-gram, whose it is, and the largest count of anybody else: what is
    # left when one text is taken out, without counting again for each.
    table: dict[Ngram, tuple[int, int, int]] = {}
    for j in chosen:
        for n in range(1, ORDER + 1):
            for ngram, count in ngrams(split[j], n).items():
                most, owner, second = table.get(ngram, (0, -1, 0))
                if count > most:
                    table[ngram] = count, j, most
                else:
                    table[ngram] = most, owner, max(second, count)

    def score(i: int) -> float:
        def most(ngram: Ngram) -> int:
            first, owner, second = table.get(ngram, (0, -1, 0))
            return second if owner == i else first

        return bleu(split[i], most, [len(split[j]) for j in chosen if j != i])

    return sum(map(score, range(len(texts)))) / len(texts)
