"""`pivotjax <command>`: finds the job and runs it; bad input ends in one line and exit status 2."""

import importlib
import logging
import os
import signal
import sys
import warnings

from pivotjax.errors import InputError

COMMANDS = {
    "demo": "the whole mission on real weights and images: fetch, pre-train, merge, evaluate, report, export",
    "prepare": "a corpus in a form that is fast to read shuffled: --corpus.format F --corpus.path P --out DIR",
    "scenario": "split a corpus into domains that differ (recipe: train/scenario_mini.yaml)",
    "pretrain": "pre-train K domain experts in one program (recipe: train/mini.yaml)",
    "pipeline": "pre-train, merge on the same devices, evaluate and export in one run (recipe: train/mini.yaml)",
    "compile": "say what a recipe needs of a TPU slice, by the TPU's own compiler: --tpu tpu_configs/v5e-256.yaml",
    "merge": "merge projectors, LoRA adapters or whole models (recipe: merge/pivot.yaml)",
    "evaluate": "measure projectors on every domain (recipe: eval/mini.yaml)",
    "generate": "caption a picture or answer about it: pivotjax generate IMAGE [PROMPT] --model CHECKPOINT",
    "convert": "a model or a projector in another format: pivotjax convert SRC DST --to orbax|hf|llava",
    "inspect": "say what a checkpoint is",
    "sweep": "tune options of a merge on calibration data: pivotjax sweep RECIPE.yaml --over lambda=0.1:1.5:0.1",
    "methods": "list the merge methods with options, defaults and sources",
}


def usage() -> str:
    lines = [f"  {name:10s}{text}" for name, text in COMMANDS.items()]
    return "usage: pivotjax COMMAND [RECIPE.yaml] [--dotted.overrides ...]\n\n" + "\n".join(
        [*lines, "", "`pivotjax COMMAND --help` lists the options of one."]
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if args else 2)
    if args[0] in ("--version", "-V"):
        from pivotjax import __version__

        print(f"pivotjax {__version__}")
        return
    if args[0] not in COMMANDS:
        print(f"pivotjax: unknown command {args[0]!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run(args[0], args[1:])


def run(command: str, args: list[str]) -> None:
    """Runs one job with the command line's manners: quiet libraries, one line for bad input."""
    _quiet()
    # A terminated job must unwind (remove temporary files) like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        importlib.import_module(f"pivotjax.jobs.{command}").main(args)
    except InputError as error:
        print(f"pivotjax {command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\npivotjax {command}: interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _quiet() -> None:
    """Library chatter stays out of the user's sight; errors do not."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"orbax\.")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name, level in (
        ("jax", logging.ERROR),
        ("grain", logging.ERROR),
        # These log, with traces, what is also raised, and so becomes one line about the checkpoint.
        ("orbax", logging.CRITICAL),
        ("asyncio", logging.CRITICAL),
    ):
        logging.getLogger(name).setLevel(level)


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Threads of a save that failed (the disk is full) still report to Orbax's event loop when that is closed."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


if __name__ == "__main__":
    main()
