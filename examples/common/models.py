"""Networks for the examples. The outputs of all are logits."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

# Keras' default of 0.99 averages over more steps than a short training at a large batch has. The
# statistics would then belong to outdated weights.
BATCH_NORM_MOMENTUM = 0.9


def for_input(shape: tuple[int, ...], classes: int) -> keras.Model:
    """Return a small 1-D conv net if inputs are signals, a ResNet-20 if they are images."""
    return conv_net_1d(shape, classes) if len(shape) == 2 else resnet(shape, classes)


def conv_net_1d(shape: tuple[int, ...], classes: int, **options: Any) -> keras.Model:
    """Return a 1-D conv net with three layers of 25 channels.

    Args:
        shape: the shape of an input.
        classes: the number of classes.
        **options: `batch_normalization` and `batch_norm_momentum`.
    """
    return _conv_net(shape, classes, layers.Conv1D, ((25, 5), (25, 3), (25, 3)), **options)


def conv_net_2d(shape: tuple[int, ...], classes: int, **options: Any) -> keras.Model:
    """Return a 2-D conv net with three layers of 16, 32 and 64 channels.

    Args:
        shape: the shape of an input.
        classes: the number of classes.
        **options: `batch_normalization` and `batch_norm_momentum`.
    """
    return _conv_net(shape, classes, layers.Conv2D, ((16, 3), (32, 3), (64, 3)), **options)


def _conv_net(
    shape: tuple[int, ...],
    classes: int,
    convolution: type[layers.Layer],
    stages: Sequence[tuple[int, int]],
    batch_normalization: bool = False,
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM,
) -> keras.Model:
    """Return a network of conv layers of stride 2, followed by a linear layer.

    Args:
        shape: the shape of an input.
        classes: the number of classes.
        convolution: the class of the conv layers.
        stages: the number of channels and the kernel size of each conv layer.
        batch_normalization: whether to normalize after each convolution.
        batch_norm_momentum: weight of the past in the averages of batch normalization.
    """
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
    """Return a ResNet for CIFAR of He et al., 2016, https://arxiv.org/abs/1512.03385.

    Args:
        shape: the shape of an image.
        classes: the number of classes.
        depth: the number of layers with weights, 6n + 2 for an integer n: 20, 32, 44, 56 or 110 in
            the paper.

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
    """Apply a residual block; a stride of 2 doubles the channels, by zeros in the shortcut."""
    shortcut = x
    if stride != 1:
        shortcut = layers.AveragePooling2D(stride)(x)
        shortcut = layers.Concatenate()([shortcut, keras.ops.zeros_like(shortcut)])
    x = layers.ReLU()(_conv(x, channels, stride))
    return layers.ReLU()(layers.Add()([_conv(x, channels), shortcut]))


def _conv(x: keras.KerasTensor, channels: int, stride: int = 1) -> keras.KerasTensor:
    """Apply a 3x3 convolution without bias, then batch normalization."""
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
    """Return a decoder-only transformer that predicts the next token at every position.

    Layers are normalized before attention and before the MLP. Positions are not encoded, as
    causal attention can infer them (Haviv et al., 2022, https://arxiv.org/abs/2203.16634).

    Args:
        tokens: the number of different tokens.
        length: the number of tokens in a sample.
        width: the number of features of a token.
        blocks: the number of blocks of attention and MLP.
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
    """Return a network of embeddings and two hidden layers, with one logit as its output.

    Args:
        tokens: the number of rows of the embedding table.
        fields: the number of rows that a sample looks up.
        width: the number of features of an embedding.
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
