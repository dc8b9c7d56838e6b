"""The model card of a merge: what was merged how, and from what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pivotjax import files
from pivotjax.merging import registry

CARD = "README.md"


def write(folder: Path, title: str, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Writes `README.md` for Hugging Face: recipe, method and its source, inputs with hashes, versions, notes."""
    method = registry.find(report["method"])
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip()
    lines = [
        "---", "tags: [merge, pivotjax]", "---", "",
        f"# {title}", "",
        f"Merged by pivotjax {report['versions']['pivotjax']} with `{method.name}`: {method.summary}", "",
        f"Source of the method: {method.source}.", "",
        "## Recipe", "", "```yaml", text, "```", "",
        "## Inputs", "", "| input | path | sha256 |", "|---|---|---|",
        *(_row(name, facts) for name, facts in report["inputs"].items()), "",
        *_section("Notes", report["notes"]),
        *_section("Left as in the base", [f"`{name}`" for name in report.get("left_as_in_base", [])]),
        "## Versions", "", ", ".join(f"{name} {version}" for name, version in report["versions"].items()), "",
    ]  # fmt: skip
    files.write_bytes(folder / CARD, "\n".join(lines).encode())


def _row(name: str, facts: Mapping[str, Any]) -> str:
    hashes = facts.get("sha256") or {"parameters": facts["fingerprint"]}
    return f"| {name} | `{facts['path']}` | {'<br>'.join(f'{file}: `{digest}`' for file, digest in hashes.items())} |"


def _section(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {item}" for item in items), ""] if items else []
