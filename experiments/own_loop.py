"""A zoo model in your own training loop: `python -m experiments.own_loop FILE`.

No recipe, no mesh, no trainer: a model, `jax.grad` and optax. The tokens are the file's bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import deepseek_jax
from deepseek_jax import zoo


def main(path: str, steps: int = 20, rows: int = 8, length: int = 128) -> list[float]:
    """Trains `zoo.tiny()` on the bytes of a file, prints the loss in nats of every step and returns them."""
    data = np.frombuffer(Path(path).read_bytes(), np.uint8).astype(np.int32)
    if len(data) <= length:
        raise ValueError(f"{path} has {len(data)} bytes; take a file of more than {length}")
    model = deepseek_jax.create(zoo.tiny(), seed=0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(2e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, tokens):
        def loss(params):
            return deepseek_jax.loss(nnx.merge(graphdef, params, rest), tokens)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    random, losses = np.random.default_rng(0), []
    for i in range(steps):
        starts = random.integers(len(data) - length, size=rows)
        tokens = np.stack([data[start : start + length + 1] for start in starts])
        params, opt_state, value = step(params, opt_state, tokens)
        losses.append(float(value))
        print(f"step {i + 1:3}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else argparse.__file__)  # any text will do
