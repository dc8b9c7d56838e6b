"""`python train/pretrain.py RECIPE.yaml [--dotted.overrides ...]`: the same as `pivotjax pretrain`."""

import sys

from pivotjax import cli

if __name__ == "__main__":
    cli.run("pretrain", sys.argv[1:])
