import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.inference.binding import _layouts, bind, bind_canonical, create
from deepseek_jax.tree import flatten
from tests.inference.conftest import CONFIG

TOKENS = jnp.arange(8, dtype=jnp.int32)[None]


@pytest.fixture(scope="module")
def trees():
    return tuple(layout.initial(0) for layout in _layouts(CONFIG))


def test_bound_from_run_time_or_canonical_form_is_one_model(trees):
    """Parameters `[1, slot, ...]` and one array per layer under its canonical name bind to the same function."""
    layouts = _layouts(CONFIG)
    arrays = {k: v for layout, tree in zip(layouts, trees, strict=True) for k, v in layout.unstack(tree).items()}
    assert "layers.4.ffn.router.bias" in arrays
    expected = create(CONFIG)(TOKENS)
    np.testing.assert_array_equal(bind(CONFIG, *trees)(TOKENS), expected)
    np.testing.assert_array_equal(bind_canonical(CONFIG, arrays)(TOKENS), expected)
    with pytest.raises(ValueError, match=r"^layers\.1\.attention\.o\.weight is missing$"):
        bind_canonical(CONFIG, {k: v for k, v in arrays.items() if k != "layers.1.attention.o.weight"})
    with pytest.raises(ValueError, match=r"^final_norm\.scale has shape \(3,\), the architecture says \(24,\)$"):
        bind_canonical(CONFIG, {**arrays, "final_norm.scale": jnp.ones(3)})


def test_a_dtype_spares_what_is_kept_in_full_precision(trees):
    model = bind(CONFIG, *trees, dtype=jnp.bfloat16)
    assert model.embedding.weight[...].dtype == jnp.bfloat16
    assert model.moe.ffn.experts.down[...].dtype == jnp.bfloat16
    assert model.moe.ffn.router.weight[...].dtype == model.final_norm.scale[...].dtype == jnp.float32
    assert model.moe.ffn.router.bias[...].dtype == jnp.float32


def test_weights_are_drawn_in_float32_and_only_matrices_are_cast(trees):
    """`create` in bfloat16 is what a run of the same seed starts from, rounded; norms and router are not rounded."""
    model, expected = create(CONFIG, dtype=jnp.bfloat16), bind(CONFIG, *trees, dtype=jnp.bfloat16)
    arrays, wanted = (flatten(nnx.to_pure_dict(nnx.state(m))) for m in (model, expected))
    for name, array in arrays.items():
        full_precision = "norm" in name or "router" in name
        assert array.dtype == (jnp.float32 if full_precision else jnp.bfloat16), name
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    with jax.enable_x64(True):
        wide = nnx.to_pure_dict(nnx.state(create(CONFIG, dtype=jnp.float64)))
    assert {array.dtype.name for array in jax.tree.leaves(wide)} == {"float64"}


def test_other_weights_are_refused(trees):
    params, bias = trees
    two_stages = {**params, "moe": jax.tree.map(lambda x: jnp.concatenate([x, x]), params["moe"])}
    with pytest.raises(ValueError, match=r"^moe\.\S+ has 2 pipeline stages; bind weights that were restored onto one$"):
        bind(CONFIG, two_stages, bias)
    with pytest.raises(ValueError, match=r"^head\.weight is missing$"):
        bind(CONFIG, {k: v for k, v in params.items() if k != "head"}, bias)
    name = next(iter(flatten(bias)))
    with pytest.raises(ValueError, match=rf"^{name.split('.')[0]}\.\S+bias is missing$"):
        bind(CONFIG, params, {k: v for k, v in bias.items() if k != name.split(".")[0]})
