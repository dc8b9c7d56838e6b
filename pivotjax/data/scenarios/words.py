"""The words that tell a domain from the others."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_WORD = re.compile(r"[^\W\d_]{2,}")
_RARE = 3  # captions: a word of fewer says nothing
_PRIOR = 1000.0  # captions that the prior is worth
_STOP = frozenset(
    "the and for with from that this are was were has have had its his her their our your you they them she him who "
    "which what where when while into onto over under out off all any some more most other than then there these those "
    "not but can will would could should been being about after before during between through up down in on at by of "
    "to an as is it be or we he my me us do so no if".split()
)


def telling(captions: Mapping[str, Sequence[str]], count: int = 12) -> dict[str, list[str]]:
    """For each domain the words whose share of captions there exceeds that elsewhere most surely.

    z-scores of the log-odds ratio with the corpus as informative Dirichlet prior (Monroe, Colaresi and Quinn 2008,
    "Fightin' words", equation 22), of captions that have a word, without stop words.
    """
    of = {domain: _counted(texts) for domain, texts in captions.items()}
    everywhere = sum(of.values(), Counter())
    words = sorted(word for word, n in everywhere.items() if n >= _RARE)
    total = np.array([everywhere[word] for word in words], float)
    return {domain: _top(words, np.array([counts[word] for word in words], float), total, count)
            for domain, counts in of.items()}  # fmt: skip


def _counted(captions: Sequence[str]) -> Counter:
    """How many captions have each word."""
    return Counter(
        word for caption in captions for word in dict.fromkeys(_WORD.findall(caption.casefold())) if word not in _STOP
    )


def _top(words: list[str], here: np.ndarray, total: np.ndarray, count: int) -> list[str]:
    prior = total * (_PRIOR / max(total.sum(), 1))
    here, there = here + prior, total - here + prior
    score = np.log(here / (here.sum() - here + 1)) - np.log(there / (there.sum() - there + 1))
    score /= np.sqrt(1 / here + 1 / there)
    order = np.argsort(-score, kind="stable")[:count]
    return [words[place] for place in order if score[place] > 0]
