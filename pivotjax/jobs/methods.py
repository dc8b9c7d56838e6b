"""`pivotjax methods`: the merge methods with their options, defaults and sources."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pivotjax import config as configs
from pivotjax.merging import describe


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
        needs = ", ".join(method["needs"]) or "nothing but the experts"
        print(
            f"{method['name']}  ({method['family']})\n    {method['summary']}\n"
            f"    source: {method['source']}\n    needs: {needs}"
        )
        for option, facts in method["options"].items():
            print(f"      {option} = {facts['default']}   [{facts['allowed']}]")
        print()
