"""Networks for the examples. All return logits."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

# Keras' own 0.99 averages over more steps than a short training at a large batch has:
# its statistics would be those of weights that are long gone.
BATCH_NORM_MOMENTUM = 0.9


def for_input(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A small 1-D conv net for signals, a ResNet-20 for images."""
    return conv_net_1d(shape, classes) if len(shape) == 2 else resnet(shape, classes)


def conv_net_1d(shape: tuple[int, ...], classes: int, **options: Any) -> keras.Model:
    """Three conv layers of 25 channels; options as below."""
    return _conv_net(shape, classes, layers.Conv1D, ((25, 5), (25, 3), (25, 3)), **options)


def conv_net_2d(shape: tuple[int, ...], classes: int, **options: Any) -> keras.Model:
    """Three conv layers of 16, 32 and 64 channels; options as below."""
    return _conv_net(shape, classes, layers.Conv2D, ((16, 3), (32, 3), (64, 3)), **options)


def _conv_net(
    shape: tuple[int, ...],
    classes: int,
    convolution: type[layers.Layer],
    stages: Sequence[tuple[int, int]],
    batch_normalization: bool = False,
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM,
) -> keras.Model:
    """Conv layers of stride 2, each with channels and kernel size, and a linear one."""
    model = keras.Sequential([keras.Input(shape)])
    for channels, kernel_size in stages:
        model.add(
            convolution(
                channels,
                kernel_size,
                strides=2,
                padding="same",
                use_bias=not batch_normalization,
                kernel_initializer="he_normal",
            )
        )
        if batch_normalization:
            model.add(layers.BatchNormalization(momentum=batch_norm_momentum))
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    model.add(layers.Dense(classes))
    return model


def resnet(shape: tuple[int, ...], classes: int, depth: int = 20) -> keras.Model:
    """The CIFAR variant of He et al., 2016, https://arxiv.org/abs/1512.03385.

    Args:
        shape: of an image.
        classes: how many there are.
        depth: 6n + 2 for a whole n: 20, 32, 44, 56 or 110 in the paper.

    Raises:
        ValueError: if there is no network of this depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"`depth` must be 8, 14, 20, 26 and so on. Received: depth={depth}")
    inputs = keras.Input(shape)
    x = layers.ReLU()(_conv(inputs, 16))
    for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(depth // 6):
            x = _residual(x, channels, first_stride if block == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def _residual(x: keras.KerasTensor, channels: int, stride: int) -> keras.KerasTensor:
    shortcut = x
    if stride != 1:
        shortcut = layers.AveragePooling2D(stride)(x)
        shortcut = layers.Concatenate()([shortcut, keras.ops.zeros_like(shortcut)])
    x = layers.ReLU()(_conv(x, channels, stride))
    return layers.ReLU()(layers.Add()([_conv(x, channels), shortcut]))


def _conv(x: keras.KerasTensor, channels: int, stride: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(
        channels,
        3,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(x)


def transformer(tokens: int, length: int, width: int = 128, blocks: int = 3) -> keras.Model:
    """A decoder that says of every token what comes next.

    Normalization comes before each part. There is no encoding of positions: causal
    attention can tell them (Haviv et al., 2022, https://arxiv.org/abs/2203.16634).
    """
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(tokens, width)(inputs)
    for _ in range(blocks):
        normalized = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(4, width // 4)
        x = layers.Add()([x, attention(normalized, normalized, use_causal_mask=True)])
        hidden = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(hidden)])
    return keras.Model(inputs, layers.Dense(tokens)(layers.LayerNormalization()(x)))


def click_model(tokens: int, fields: int, width: int = 8) -> keras.Model:
    """Embeddings of all fields, and two hidden layers; one logit.

    Args:
        tokens: how many rows the table of embeddings has.
        fields: how many of them a sample looks up.
        width: of an embedding.
    """
    return keras.Sequential(
        [
            keras.Input((fields,), dtype="int32"),
            layers.Embedding(tokens, width),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
