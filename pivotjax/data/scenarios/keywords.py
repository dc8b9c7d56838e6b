"""Domains by topic: a caption belongs to the topic that most of its words are of."""

import json
import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pivotjax.data.scenarios.base import OUT, Assignment, Request, Splitter
from pivotjax.data.scenarios.columns import Column, Rows, Simple
from pivotjax.errors import InputError

REST = "rest"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class KeywordsConfig:
    """The topics."""

    topics: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Topic -> its words, in lower case; `dog*` stands for all words that begin so."""
    rest: Literal["out", "domain"] = "out"
    """Captions with no topic's words: left out, or a domain of their own, "rest"."""


def columns(options: KeywordsConfig) -> tuple[Column, ...]:
    """The topic of each caption."""
    if not options.topics or not all(options.topics.values()):
        raise InputError("keywords needs topics with words; write `topics: {animals: [dog, cat], ...}`")
    if REST in options.topics:
        raise InputError(f"no topic can be named {REST}; that is where captions without one go")
    patterns = [_pattern(words) for words in options.topics.values()]

    def of(rows: Rows) -> np.ndarray:
        return np.array([_topic(caption.casefold(), patterns) for caption in rows.captions], np.int16)

    return (Simple("topic", of, json.dumps(list(options.topics.values()))),)


def _pattern(words: tuple[str, ...]) -> re.Pattern:
    """Any of the words, whole or, with a star, as a beginning."""
    parts = [re.escape(word.casefold().rstrip("*")) + (r"\w*" if word.endswith("*") else "") for word in words]
    return re.compile(rf"\b(?:{'|'.join(parts)})\b")


def _topic(caption: str, patterns: list[re.Pattern]) -> int:
    """The topic with most different words in the caption, the first of equals; OUT where none has any."""
    found = [len(set(pattern.findall(caption))) for pattern in patterns]
    return int(np.argmax(found)) if max(found) else OUT


def assign(options: KeywordsConfig, request: Request) -> Assignment:
    """A domain a topic, and the rest where that is asked for."""
    domains = np.where(request.good, request.columns["topic"].map(), OUT).astype(np.int16)
    without = request.good & (domains == OUT)
    facts = {"captions without a topic": int(without.sum())}
    if options.rest == "out":
        return Assignment(tuple(options.topics), domains, facts)
    domains[without] = len(options.topics)
    return Assignment((*options.topics, REST), domains, facts)


SPLITTER = Splitter("by topic: lists of words that captions have", assign, columns)
