"""Sizes of the EfficientNet-Lites: Tan and Le 2019 (arXiv 1905.11946), table 1, in the Lite form."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`repeats` blocks of one kind; the first has the stride and changes the channels."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Sizes of an EfficientNet-Lite."""

    stem: int
    stages: tuple[Stage, ...]
    head: int
    classes: int
    image_size: int


LITE0 = EfficientNetLiteConfig(
    stem=32,
    stages=(
        Stage(1, 3, 1, 1, 16),
        Stage(2, 3, 2, 6, 24),
        Stage(2, 5, 2, 6, 40),
        Stage(3, 3, 2, 6, 80),
        Stage(3, 5, 1, 6, 112),
        Stage(4, 5, 2, 6, 192),
        Stage(1, 3, 1, 6, 320),
    ),
    head=1280,
    classes=1000,
    image_size=224,
)
