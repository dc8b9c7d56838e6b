"""`python merge/merge.py RECIPE.yaml [--dotted.overrides ...]`: the same as `pivotjax merge`."""

import sys

from pivotjax import cli

if __name__ == "__main__":
    cli.run("merge", sys.argv[1:])
