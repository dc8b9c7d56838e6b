"""Configurations: recipes and overrides, what is wrong with them in one line, golden dumps of the shipped recipes."""

import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pivotjax import cli
from pivotjax import config as configs
from pivotjax.errors import InputError
from pivotjax.jobs import merge
from pivotjax.jobs.compile import CompileConfig
from pivotjax.jobs.convert import ConvertConfig
from pivotjax.jobs.demo import DemoConfig
from pivotjax.jobs.evaluate import EvaluateConfig
from pivotjax.jobs.generate import GenerateConfig
from pivotjax.jobs.inspect import InspectConfig
from pivotjax.jobs.merge import MergeConfig
from pivotjax.jobs.methods import MethodsConfig
from pivotjax.jobs.pipeline import PipelineConfig
from pivotjax.jobs.prepare import PrepareConfig
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.jobs.scenario import ScenarioConfig
from pivotjax.jobs.sweep import SweepConfig

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(path.relative_to(ROOT) for room in ("train", "merge", "eval") for path in ROOT.glob(f"{room}/*.yaml"))


@dataclass(frozen=True)
class Section:
    """A section."""

    rate: float = 0.5
    every_steps: int = 3
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        configs.check_least(self, every_steps=1)


@dataclass(frozen=True)
class Config:
    """All kinds of fields."""

    out: Path
    section: Section = field(default_factory=Section)
    names: tuple[str, ...] = ("a",)
    paths: dict[str, Path] = field(default_factory=dict)
    extra: Section | None = None
    limit: int | None = None
    quiet: bool = False


def parsed(tmp_path, text="", *args):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return configs.parse(Config, [str(recipe), *args], "job")


def test_recipe_then_overrides(tmp_path):
    text = "out: a\nsection: {rate: 1e-3, mode: slow}\nnames: [x, y]\npaths: {p: q/r}\nquiet: true\n"
    assert parsed(tmp_path, text) == Config(
        Path("a"), Section(1e-3, 3, "slow"), ("x", "y"), {"p": Path("q/r")}, quiet=True
    )
    args = "--section.every-steps 7 --section.rate=2e-4 --names z --limit 5 --paths.p s --no-quiet".split()
    assert parsed(tmp_path, text, *args) == Config(
        Path("a"), Section(2e-4, 7, "slow"), ("z",), {"p": Path("s")}, limit=5
    )
    assert parsed(tmp_path, text, "--section.every_steps", "7").section.every_steps == 7


def test_overrides_alone_and_required_fields(tmp_path):
    assert configs.parse(Config, ["--out", "b"], "job") == Config(Path("b"))
    with pytest.raises(InputError, match="--out"):
        parsed(tmp_path, "limit: 3\n")


def test_an_optional_section_appears_with_its_first_option(tmp_path):
    assert parsed(tmp_path, "out: a\n").extra is None
    assert parsed(tmp_path, "out: a\n", "--extra.rate", "2").extra == Section(2.0)
    assert parsed(tmp_path, "out: a\nextra: {mode: slow}\n", "--extra.rate", "2").extra == Section(2.0, mode="slow")
    assert parsed(tmp_path, "out: a\nextra: null\n").extra is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sektion: {}", "unknown key `sektion`; did you mean `section`?"),
        ("section: {every-steps: 3}", "unknown key `section.every-steps`; did you mean `section.every_steps`?"),
        ("section: {zzz: 3}", "unknown key `section.zzz`; known keys: rate, every_steps, mode"),
        ("section: {every_steps: 2.5}", "`section.every_steps` must be a whole number, not 2.5"),
        ("section: {every_steps: true}", "`section.every_steps` must be a whole number, not True"),
        ("section: {every_steps: 0}", "section.every_steps must be at least 1, not 0"),
        ("section: {rate: fast}", "`section.rate` must be a number, not 'fast'"),
        ("section: {rate: true}", "`section.rate` must be a number, not True"),
        ("section: {mode: middling}", "`section.mode` must be one of fast, slow, not 'middling'"),
        ("section: 3", "`section` must be a mapping of keys, not 3"),
        ("names: a", "`names` must be a list, not 'a'"),
        ("names: [1]", "`names[0]` must be text, not 1"),
        ("paths: {p: 3}", "`paths.p` must be a path, not 3"),
        ("out: 3", "`out` must be a path, not 3"),
        ("quiet: 1", "`quiet` must be true or false, not 1"),
        ("- a\n- b", "must hold `key: value` lines, not a list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_file_and_key(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        parsed(tmp_path, text)
    message = str(caught.value)
    assert said in message and "\n" not in message and "recipe.yaml" in message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--section.every-step", "3"], "did you mean --section.every-steps?"),
        (["--sektion.rate=3"], "did you mean --section.rate?"),
        (["--section.rate", "fast"], "--section.rate: could not convert string to float: 'fast'"),
        (["--section.every-steps", "0"], "every_steps must be at least 1, not 0"),
        (["--section.mode", "middling"], "'middling' for argument '--section.mode'"),
        (["--limit"], "Missing value for argument '--limit'"),
        (["more"], "more"),
    ],
)
@pytest.mark.parametrize("boxes", [True, False])
def test_wrong_overrides_are_said_in_one_line(tmp_path, monkeypatch, args, said, boxes):
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", boxes)
    with pytest.raises(InputError) as caught:
        parsed(tmp_path, "out: a\n", *args)
    message = str(caught.value)
    assert said in message and message.endswith("see `job --help`"), message
    assert not set("\n│─╭╰") & set(message) and "--- " not in message, message


def test_missing_and_unreadable_recipes(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: No such file"):
        configs.parse(Config, [str(tmp_path / "nowhere.yaml")], "job")
    with pytest.raises(InputError, match="Is a directory"):
        configs.parse(Config, [str(tmp_path)], "job")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.yaml is not valid YAML"):
        configs.parse(Config, [str(tmp_path / "binary.yaml")], "job")


def test_resolved_config_reads_back_as_itself(tmp_path):
    config = Config(Path("a"), Section(1e-5), ("x", "ä"), {"p:q": Path("r")}, Section(3.0), 5, True)
    assert parsed(tmp_path, configs.to_yaml(config)) == config


def resolved_recipe(path: Path) -> str:
    if path.parts[0] == "merge":
        job, recipe = merge.parse([str(ROOT / path)])
        return configs.to_yaml({"job": configs.resolved(job), "recipe": configs.resolved(recipe)})
    cls = {"train": PretrainConfig, "eval": EvaluateConfig}[path.parts[0]]
    cls = ScenarioConfig if path.stem.startswith("scenario") else cls
    return configs.to_yaml(configs.parse(cls, [str(ROOT / path)], "pivotjax"))


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_shipped_recipes_resolve_to_their_golden_dumps(path):
    golden, now = GOLDEN / f"{path.parent}_{path.stem}.yaml", resolved_recipe(path)
    if os.environ.get("PIVOTJAX_RENEW_GOLDEN"):
        golden.write_text(now)
    before = golden.read_text() if golden.exists() else ""
    changes = "".join(difflib.unified_diff(before.splitlines(True), now.splitlines(True), str(golden), "now"))
    assert not changes, f"{changes}\nIf that is meant: PIVOTJAX_RENEW_GOLDEN=1 pytest tests/test_config.py, and commit."


def test_no_golden_dump_without_its_recipe():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{path.parent}_{path.stem}.yaml" for path in RECIPES}


COMMANDS = {
    "demo": DemoConfig,
    "prepare": PrepareConfig,
    "scenario": ScenarioConfig,
    "pretrain": PretrainConfig,
    "pipeline": PipelineConfig,
    "compile": CompileConfig,
    "merge": MergeConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "convert": ConvertConfig,
    "inspect": InspectConfig,
    "methods": MethodsConfig,
}


def options(cls: Any, prefix: str = "") -> list[str]:
    """The dotted options of a config's fields; positional ones and mappings by their bare name. Mappings to sections
    (corpora) are for recipes."""
    found = []
    for one in dataclasses.fields(cls):
        if typing.get_origin(one.type) is dict and dataclasses.is_dataclass(typing.get_args(one.type)[1]):
            continue
        kinds = [one.type, *getattr(one.type, "__args__", ())]
        sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        name = one.name.replace("_", "-")
        found += options(sections[0], f"{prefix}{name}.") if sections else [f"--{prefix}{name}"]
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    positional = {"generate": ("--image", "--images", "--prompt"), "inspect": ("--checkpoint",),
                  "convert": ("--src", "--dst")}.get(command, ())  # fmt: skip
    missing = [option for option in options(COMMANDS[command]) if option not in shown and option not in positional]
    assert not missing, shown


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(command in shown for command in cli.COMMANDS)
    assert set(COMMANDS) == set(cli.COMMANDS)
