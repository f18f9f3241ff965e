"""What a user meets first: the names of the package, and the README's loop."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax
from experiments import own_loop
from tests.inference.conftest import CONFIG


def test_importing_the_package_loads_neither_jax_nor_flax():
    code = "import sys, deepseek_jax; dir(deepseek_jax); print([m for m in ('jax', 'flax') if m in sys.modules])"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def test_every_public_name_is_there():
    assert {*deepseek_jax.__all__} <= {*dir(deepseek_jax)}
    for name in deepseek_jax.__all__:
        assert getattr(deepseek_jax, name) is not None
    assert deepseek_jax.zoo.tiny() is not None
    with pytest.raises(AttributeError, match="has no attribute 'load_everything'"):
        _ = deepseek_jax.load_everything


def test_loss_is_the_mean_next_token_loss_and_reaches_parameters_only():
    model = deepseek_jax.create(CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 9)), jnp.int32)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(params):
        return deepseek_jax.loss(nnx.merge(graphdef, params, rest), tokens)

    log_probabilities = jax.nn.log_softmax(jax.jit(lambda model, tokens: model(tokens))(model, tokens[:, :-1]))
    expected = -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()
    value, gradients = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    gradients = nnx.to_pure_dict(gradients)
    assert float(jnp.abs(gradients["moe"]["ffn"]["router"]["weight"]).max()) > 0
    assert "bias" not in gradients["moe"]["ffn"]["router"]
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients["mtp"]))


def test_own_loop_learns(capsys):
    losses = own_loop.main(own_loop.__file__, steps=4, rows=2, length=32)
    assert losses[-1] < losses[0] - 0.5
    assert capsys.readouterr().out.count("loss") == 4


def test_own_loop_names_a_file_that_is_too_short(tmp_path):
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ValueError, match=r"short has 3 bytes; take a file of more than 128$"):
        own_loop.main(str(tmp_path / "short"))
