"""Shapes of the trainable variables of well-known models."""

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def parameters(shapes: Sequence[Shape]) -> int:
    """Return the number of parameters of all variables together."""
    return sum(math.prod(shape) for shape in shapes)


def equal_vectors(parameters: int, variables: int) -> list[Shape]:
    """Return the shapes of `variables` vectors of one length, `parameters` in all."""
    return [(parameters // variables,)] * variables


def _resnet20() -> list[Shape]:
    """Return the shapes of the ResNet-20 for CIFAR, whose convolutions have no bias."""
    shapes = _normalized_conv(3, 3, 16, bias=False)
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += _normalized_conv(3, channels, width, bias=False)
            shapes += _normalized_conv(3, width, width, bias=False)
            channels = width
    return [*shapes, (64, 10), (10,)]


def _resnet50() -> list[Shape]:
    """Return the shapes of the ResNet-50 of `keras.applications`, convolutions with bias."""
    shapes = _normalized_conv(7, 3, 64)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                shapes += _normalized_conv(1, channels, 4 * width)
            shapes += _normalized_conv(1, channels, width)
            shapes += _normalized_conv(3, width, width)
            shapes += _normalized_conv(1, width, 4 * width)
            channels = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def _normalized_conv(size: int, inputs: int, outputs: int, bias: bool = True) -> list[Shape]:
    """Return the shapes of a convolution and of its batch normalization's scale and offset."""
    vectors = 3 if bias else 2
    return [(size, size, inputs, outputs), *[(outputs,)] * vectors]


def _bert_base(width: int = 768) -> list[Shape]:
    """Return the shapes of BERT-base without its pooler."""
    embeddings = [(30522, width), (512, width), (2, width)]
    normalization = [(width,)] * 2
    layer = [
        *[(width, width), (width,)] * 4,
        *normalization,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
        *normalization,
    ]
    return [*embeddings, *normalization, *layer * 12]


# Shapes of the trainable variables of each model.
MODELS: dict[str, list[Shape]] = {
    "resnet20": _resnet20(),
    "vectors": [(64,)] * 1_000,
    "resnet50": _resnet50(),
    "bert_base": _bert_base(),
}

# Names of the models in tables and pictures.
NAMES = {
    "resnet20": "ResNet-20",
    "vectors": "1,000 x 64",
    "resnet50": "ResNet-50",
    "bert_base": "BERT-base",
}

TABLE: list[Shape] = [(15_625_000, 64)]
"""One embedding table of 10^9 parameters."""
