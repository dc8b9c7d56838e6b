"""Shapes: one coloured rectangle, circle or triangle on a pale ground, from easy-VQA ("a blue rectangle")."""

import hashlib
import json
from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.sources.base import Item, Source

_FOLDER = "easy_vqa/data/train/"  # its test images stay unseen, for its own questions
_SHAPES = frozenset({"rectangle", "circle", "triangle"})
_COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
_NEGATIONS = frozenset({"not", "no"})


def items(files: dict[str, Path]) -> list[Item]:
    """Every training image whose questions and answers tell both its colour and its shape; about 3,500.

    The concept is the image: there are only 24 captions, every split has to hold all of them, and what the test asks is
    whether colour and form are recognised on pictures that were not seen. Equal images share their concept.
    """
    wheel = files["easy-vqa"]
    colours, shapes = _facts(json.loads(members(wheel, _FOLDER + "questions", ".json")[""]))
    found = []
    for name, png in members(wheel, _FOLDER + "images/", ".png").items():
        number = int(name)
        if number in colours and number in shapes:
            concept = f"shape {hashlib.sha256(png).hexdigest()[:16]}"
            found.append(Item(f"shapes/{name}", concept, f"a {colours[number]} {shapes[number]}", png, "png"))
    return found


def _facts(questions: list[tuple[str, str, int]]) -> tuple[dict[int, str], dict[int, str]]:
    """Colour and shape of each image that its questions give away.

    "what color is the circle?" holds of a circle, as its answer holds of the colour; "is there a red shape?" holds of a
    red one if the answer is yes, "is there not a red shape?" if it is no.
    """
    colours, shapes = {}, {}
    for question, answer, image in questions:
        words = set(question.rstrip("?").split())
        if answer in ("yes", "no"):
            true = (answer == "yes") != bool(words & _NEGATIONS)
            words = words if true else set()
        for word in words | {answer}:
            if word in _COLOURS:
                colours[image] = word
            elif word in _SHAPES:
                shapes[image] = word
    return colours, shapes


SOURCE = Source(
    name="shapes",
    assets=("easy-vqa",),
    licence=ASSETS["easy-vqa"].licence,
    attribution=ASSETS["easy-vqa"].attribution,
    items=items,
    closed_captions=True,
)
