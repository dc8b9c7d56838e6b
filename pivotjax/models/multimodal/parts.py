"""What the families' config.json and tensor names have in common: a text model, a vision tower, tables joined."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pivotjax.checkpoints.names import Names, Rule
from pivotjax.errors import InputError
from pivotjax.models import language, vision
from pivotjax.models.settings import Settings


def language_part(settings: Settings, tied: bool) -> dict[str, Any]:
    """`text_config`: its `model_type`, and the decoder's config."""
    text = settings.part("text_config")
    kind = text.get("model_type") or "llama"
    family = language.family_of(kind, text.where)
    return {
        "language_type": kind, "language": family.config({**text.fields, "tie_word_embeddings": tied}, text.where)
    }  # fmt: skip


def vision_part(settings: Settings, kinds: Mapping[str, str]) -> dict[str, Any]:
    """`vision_config`: its `model_type`, one of `kinds` (left out, the first), as the kind stands for; the tower's."""
    tower = settings.part("vision_config")
    if not tower.fields:
        raise InputError(f"{settings.where} has no field 'vision_config'; get the model's config.json again")
    tower = Settings({"model_type": next(iter(kinds)), **tower.fields}, tower.where)
    kind = kinds[tower.one_of("model_type", *kinds)]
    return {"vision_type": kind, "vision": vision.FAMILIES[kind].config(tower.fields, tower.where)}


def joined(*tables: Names, rules: tuple[Rule, ...] = (), aliases: tuple[tuple[str, str], ...] = ()) -> Names:
    """One table of several; `aliases` come before theirs."""
    return Names(
        rules + tuple(rule for table in tables for rule in table.rules),
        aliases + tuple(alias for table in tables for alias in table.aliases),
        tuple(one for table in tables for one in table.ignore),
    )


def beginning(table: Names, **new: str) -> Names:
    """A table whose keys begin otherwise: `beginning(table, model="model.text_model", lm_head="lm_head")`."""

    def renamed(key: str) -> str:
        first, rest = key.split(".", 1)
        return f"{new[first]}.{rest}"

    rules = tuple(replace(rule, keys=tuple(map(renamed, rule.keys))) for rule in table.rules)
    ignore = tuple(
        re.escape(new[first]) + rest for first, rest in (re.match(r"(\w+)(.*)", one).groups() for one in table.ignore)
    )
    return Names(rules, ignore=ignore)
