"""Networks for the examples. All return logits."""

import keras
from keras import layers


def for_input(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A small 1-D conv net for signals, a ResNet-20 for images."""
    return conv_net_1d(shape, classes) if len(shape) == 2 else resnet20(shape, classes)


def conv_net_1d(shape: tuple[int, ...], classes: int) -> keras.Model:
    """Three conv layers of 25 channels, without batch normalization."""
    return keras.Sequential(
        [
            keras.Input(shape),
            *(
                layers.Conv1D(
                    25,
                    kernel_size,
                    strides=2,
                    padding="same",
                    activation="relu",
                    kernel_initializer="he_normal",
                )
                for kernel_size in (5, 3, 3)
            ),
            layers.Flatten(),
            layers.Dense(classes),
        ]
    )


def resnet20(shape: tuple[int, ...], classes: int) -> keras.Model:
    """The CIFAR variant of He et al., 2016, https://arxiv.org/abs/1512.03385."""
    inputs = keras.Input(shape)
    x = layers.ReLU()(_conv(inputs, 16))
    for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
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
    return layers.BatchNormalization()(x)


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
