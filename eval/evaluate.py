"""`python eval/evaluate.py RECIPE.yaml [--dotted.overrides ...]`: the same as `pivotjax evaluate`."""

import sys

from pivotjax import cli

if __name__ == "__main__":
    cli.run("evaluate", sys.argv[1:])
