"""`pivotjax methods`: the merge methods with their options, defaults and sources."""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pivotjax import config as configs
from pivotjax.merging import METHODS, describe


@dataclass(frozen=True)
class MethodsConfig:
    """Lists the merge methods: what each does, needs and takes, and where its definition comes from."""

    json: bool = False
    """Print JSON."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    methods = describe()
    if configs.overridden(MethodsConfig(), args, "pivotjax methods").json:
        print(json.dumps(methods, indent=1))
        return
    for method in methods:
        print(f"{summary(method)}\n")


def summary(method: dict[str, Any]) -> str:
    """One entry of `describe()` as text."""
    needs = ", ".join(method["needs"]) or "nothing but the experts"
    lines = [f"{method['name']}  ({method['family']})", f"    {method['summary']}", f"    source: {method['source']}",
             f"    needs: {needs}"]
    for option, facts in method["options"].items():
        lines.append(f"      {option} = {facts['default']}   [{facts['allowed']}]")
    return "\n".join(lines)


def manual(name: str) -> str:
    """Everything about one method: what it does, its options as flags, with defaults, values and meaning."""
    method = next(method for method in describe() if method["name"] == name)
    meaning = option_docs(name)
    lines = [f"{name} ({method['family']}): {method['summary']}", f"source: {method['source']}",
             f"needs: {', '.join(method['needs']) or 'nothing but the experts'}", "",
             f"options of {name} (several values: a gradient over the layers; name=value: one for each expert)"]
    for option, facts in method["options"].items():
        lines.append(f"  --{option.replace('_', '-')} (default: {facts['default']})   [{facts['allowed']}]")
        lines += textwrap.wrap(meaning.get(option, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def option_docs(name: str) -> dict[str, str]:
    """What the docstring of a method says of each option, in its `Args:` section."""
    doc = textwrap.dedent("    " + (METHODS[name].function.__doc__ or ""))
    section = re.search(r"^ *Args:\n((?: +\S.*\n| *\n)*)", doc + "\n", re.MULTILINE)
    entries = re.findall(r"^( +)(\w+): (.*(?:\n\1 +.*)*)", section[1] if section else "", re.MULTILINE)
    return {option: " ".join(text.split()) for _, option, text in entries}
