import jax
import jax.numpy as jnp

from deepseek_jax import zoo
from deepseek_jax.inference.cache import LatentCache
from tests.inference.conftest import CONFIG


def test_bytes_per_token_of_v3_in_bf16():
    """Facts 2.1: 61 layers of 512 + 64 BF16 values are 70.272 KB per token (ISCA paper, table 1)."""
    cache = jax.eval_shape(lambda: LatentCache.empty(zoo.deepseek_v3(), batch=1, capacity=1, dtype=jnp.bfloat16))
    assert sum(a.size * a.dtype.itemsize for a in cache.entries.values()) == 70_272


def test_an_empty_cache_has_an_entry_per_layer_row_and_token():
    cache = LatentCache.empty(CONFIG, batch=3, capacity=16, dtype=jnp.bfloat16)
    assert {kind: a.shape for kind, a in cache.entries.items()} == {"dense": (2, 3, 16, 12), "moe": (3, 3, 16, 12)}
    assert cache.capacity == 16
    assert cache.lengths.tolist() == [0, 0, 0]
    assert {a.dtype.name for a in cache.entries.values()} == {"bfloat16"}
