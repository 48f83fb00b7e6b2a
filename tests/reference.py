"""SNGM in plain NumPy and float64, to be read beside the paper.

The class follows Algorithm 1 of arXiv 2007.13985 and uses its notation: weights w, mini-batch
gradient g, momentum u, learning rate eta and momentum coefficient beta.
"""

import numpy as np


class ReferenceSNGM:
    """SNGM in NumPy. It keeps float64 copies of the weights, which `step` updates.

    The arguments are those of `keras_sngm.SNGM`, with 0 or infinity in place of `None`.

    Attributes:
        w: the weights.
        u: the momentum of each weight.
        g: the gradient of the last step that was not skipped, after coupled decay and clipping.
        unclipped_norm: the norm of this gradient before `clipnorm` and `global_clipnorm`.
        gradient_norm: the norm of the last gradient after coupled decay and clipping; not finite if
            the step was skipped.
    """

    def __init__(
        self,
        weights,
        momentum=0.9,
        nesterov=False,
        blockwise=False,
        weight_decay=0.0,
        decoupled_weight_decay=True,
        clipnorm=np.inf,
        clipvalue=np.inf,
        global_clipnorm=np.inf,
    ):
        self.w = [np.array(weight, "float64") for weight in weights]
        self.u = [np.zeros_like(weight) for weight in self.w]
        self.beta = momentum
        self.nesterov = nesterov
        self.blockwise = blockwise
        self.weight_decay = weight_decay
        self.decoupled = decoupled_weight_decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.gradient_norm = 0.0

    def step(self, gradients, eta):
        """Take a step with the learning rate `eta`; skip the step if norm(g) is not finite."""
        g = [np.array(gradient, "float64") for gradient in gradients]
        if not self.decoupled:
            g = [gi + self.weight_decay * wi for gi, wi in zip(g, self.w)]
        if not np.isfinite(norm(g)):
            self.gradient_norm = norm(g)
            return
        g = [np.clip(gi, -self.clipvalue, self.clipvalue) for gi in g]
        self.unclipped_norm = norm(g)
        g = [gi * min(1.0, self.clipnorm / max(norm([gi]), 1e-300)) for gi in g]
        g = [gi * min(1.0, self.global_clipnorm / max(norm(g), 1e-300)) for gi in g]

        self.g = g
        self.gradient_norm = norm(g)
        unit = [gi / (self.gradient_norm or 1.0) for gi in g]
        if self.blockwise:
            unit = [gi / (norm([gi]) or 1.0) for gi in g]

        if self.decoupled:
            self.w = [wi * (1.0 - eta * self.weight_decay) for wi in self.w]
        for i, gi in enumerate(unit):
            self.u[i] = self.beta * self.u[i] + gi
            ahead = self.beta * self.u[i] + gi if self.nesterov else self.u[i]
            self.w[i] = self.w[i] - eta * ahead


def norm(arrays):
    """Return the Euclidean norm over all elements of a list of arrays."""
    return np.sqrt(sum(np.sum(array * array) for array in arrays))
