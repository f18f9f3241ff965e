"""Moments that are not shaped like their parameters have no place in a checkpoint, and are refused by name."""

from __future__ import annotations

import jax
import optax
import pytest
from small_model import small

from deepseek_jax.config import ConfigError
from deepseek_jax.model.parameters import parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.training.optimizer import map_moments
from deepseek_jax.tree import map_leaves

SHAPES = map_leaves(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), parameter_specs(Transformer(small())))


def parts(optimizer: optax.GradientTransformation) -> list[str]:
    """Paths of the parts of its state that checkpoints take as moments."""
    found: list[str] = []
    state = jax.eval_shape(optimizer.init, SHAPES)
    map_moments(lambda name, part: found.append(name), state, SHAPES, other=lambda name, leaf: None)
    return found


def test_adafactors_moments_are_refused():
    factored = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=4), optax.scale(-1.0))
    with pytest.raises(ConfigError, match=r"^the optimizer's 0\.v_row has an array of shape \(.*\) for a parameter of"):
        parts(factored)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.adamw(1e-3), ["0.mu", "0.nu"]),
        (optax.lion(1e-3), ["0.mu"]),
        (optax.sgd(1e-3), []),
        (optax.chain(optax.clip(1.0), optax.trace(0.9)), ["1.trace"]),
    ],
)
def test_moments_of_the_parameters_shapes_are_taken(optimizer, expected):
    assert parts(optimizer) == expected
