"""The bytes that a run says its dispatch moved are those of its program."""

import jax.numpy as jnp
import pytest
from small_model import gradient_descent, small

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.placement import place
from deepseek_jax.training.sharding_table import abstract_mesh, step_collectives
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.training.step_record import bytes_per_row

MODEL = small(num_layers=2, num_dense_layers=1, mtp_depth=0)


@pytest.mark.parametrize(("compute", "wire"), [("float32", None), ("float32", "bfloat16"), ("bfloat16", None)])
def test_bytes_of_a_row_are_what_one_slot_of_all_exchanges_holds(compute, wire):
    """Of one MoE layer forward and backward; rows travel in the dtype of the policy, weights in float32."""
    config = StepConfig(compute_dtype=jnp.dtype(compute), dispatch_dtype=wire and jnp.dtype(wire))
    mesh = abstract_mesh(ParallelConfig(expert=4))
    trainer = Trainer(Transformer(MODEL), place(MODEL), mesh, gradient_descent, config)
    exchanges = [one for one in step_collectives(trainer, (4, 17)) if one.kind == "all_to_all"]
    (hop,) = trainer.dispatchers((4, 17))[0].hops
    total = sum(one.input_bytes * one.calls for one in exchanges)
    assert total == hop.received * bytes_per_row(
        MODEL.hidden_size, MODEL.moe.experts_per_token, wire=config.dispatch_dtype, compute=config.compute_dtype
    )
    rows = {one.dtype for one in exchanges if one.shape[-1] == MODEL.hidden_size}
    assert rows == {wire or compute}
