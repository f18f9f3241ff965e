"""What an experiment says of its step reaches the trainer: no switch of a recipe is lost on the way."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from small_model import abstract_state, full, hyperparameters, small

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.data import DataConfig, TokenizerConfig
from deepseek_jax.parallel.dispatch import ExpertMesh, check_experts, choose_dispatcher
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.precision.policy import FLOAT32, PrecisionPolicy
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.loop import make_trainer
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import ScheduleConfig, constant
from deepseek_jax.training.step_config import StepConfig

MODEL = small(num_layers=1, num_dense_layers=1, mtp_depth=0)


def recipe(*, balance_weight: float = 1e-4, model: ModelConfig = MODEL, **changes) -> Experiment:
    schedule = ScheduleConfig(
        total_tokens=100, learning_rate=constant(1.0), batch_rows=constant(2), balance_weight=balance_weight
    )
    data, tokenizer = DataConfig(sequence_length=16), TokenizerConfig(path="any")
    return Experiment(model=model, schedule=schedule, data=data, tokenizer=tokenizer, **changes)


CHANGES = {
    "microbatch_rows": ({"parallel": ParallelConfig(microbatch_rows=3)}, 3),
    "schedule": ({"parallel": ParallelConfig(schedule="zb_h1")}, "zb_h1"),
    "chunks": ({"parallel": ParallelConfig(chunks=3)}, 3),
    "put_off": ({"parallel": ParallelConfig(put_off=1)}, 1),
    "overlap": ({"parallel": ParallelConfig(overlap="steady")}, "steady"),
    "recompute": ({"parallel": ParallelConfig(recompute="full")}, "full"),
    "unroll_layers": ({"parallel": ParallelConfig(unroll_layers=2)}, 2),
    "compute_dtype": ({"precision": PrecisionPolicy(compute="bfloat16")}, jnp.dtype("bfloat16")),
    "mask_documents": ({"mask_documents": True}, True),
    "balance_weight": ({"balance_weight": 0.02}, 0.02),
    "balance_from_routed": ({"balance_from_routed": True}, True),
    "force_balance": ({"force_balanced_routing": True}, True),
    "zero": ({"parallel": ParallelConfig(zero=False)}, False),
    "dispatcher": ({"parallel": ParallelConfig(dispatcher="all_to_all")}, "all_to_all"),
    "capacity": ({"parallel": ParallelConfig(capacity=2.0)}, 2.0),
    "dispatch_dtype": (
        {"precision": PrecisionPolicy(compute="float32", dispatch="bfloat16")},
        jnp.dtype("bfloat16"),
    ),
    "clip_norm": ({"optimizer": OptimizerConfig(clip_norm=0.7)}, 0.7),
}
"""For every field of `StepConfig`: a recipe's own way to set it, and the value it then has."""


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(StepConfig)])
def test_every_choice_of_a_recipe_reaches_the_step(name):
    """And changes nothing else; a new field of `StepConfig` needs its line above."""
    changes, wanted = CHANGES[name]
    plain = StepConfig()
    assert wanted != getattr(plain, name), "a default proves nothing"
    config = make_trainer(recipe(**{"precision": FLOAT32} | changes)).config
    assert config == dataclasses.replace(plain, **{name: wanted})


def test_what_a_mesh_cannot_hold_is_refused_in_one_line():
    """Before any device work: stages, and experts, groups or dispatchers that do not fit the devices."""
    refused = {
        "2 stages are more than the model's 1 layers": ParallelConfig(pipe=2),
        "parallel.schedule=dualpipe parallel.pipe=3: dualpipe needs an even number of ranks, not 3": ParallelConfig(
            pipe=3
        ),
        "parallel.layers_per_stage=(1, 1) is for 2 stages with 2 layers": ParallelConfig(
            pipe=2, layers_per_stage=(1, 1)
        ),
        "parallel.schedule=dualpipe parallel.pipe=2 parallel.chunks=2: chunks belong to": ParallelConfig(
            pipe=2, chunks=2
        ),
        "the mesh pipe 1 x data 1 x node 1 x expert 4 needs 4 devices": ParallelConfig(expert=4),
    }
    for line, parallel in refused.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(line)}[^\n]*$"):
            make_trainer(recipe(parallel=parallel))
    moe = MODEL.moe
    with pytest.raises(ConfigError, match=r"^8 experts cannot be split evenly over 3 devices \(node 1 x expert 3\)"):
        check_experts(moe, ExpertMesh(expert=3), "all_to_all")
    with pytest.raises(ConfigError, match=r"^model.moe.num_groups \(4\) does not map to 8 nodes[^\n]*$"):
        check_experts(moe, ExpertMesh(node=8), "two_hop")
    check_experts(moe, ExpertMesh(node=8), "all_to_all")
    with pytest.raises(ConfigError, match=r"^parallel.dispatcher=local needs all experts on one device[^\n]*$"):
        choose_dispatcher("local", ExpertMesh(2, 4))


def test_the_paper_is_the_default():
    """Clip 1.0, α of 1e-4, attention across documents, fractions from the raw scores (sections 2.1.2, 4.1 and 4.2)."""
    config = make_trainer(recipe()).config
    assert (config.clip_norm, config.balance_weight) == (1.0, 1e-4)
    assert (config.mask_documents, config.balance_from_routed) == (False, False)
    assert (config.compute_dtype, config.recompute) == (jnp.bfloat16, "selective")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceOnly(OptimizerConfig):
    """An optimizer of a recipe's own."""

    def make(self, specs) -> optax.GradientTransformation:
        del specs
        return optax.trace(self.beta1)


def test_model_optimizer_and_mesh_are_those_of_the_recipe():
    trainer = make_trainer(recipe(optimizer=TraceOnly(beta1=0.5)))
    assert trainer.model.config == MODEL
    assert isinstance(abstract_state(trainer).opt_state, optax.TraceState)
    assert trainer.mesh.shape == {"pipe": 1, "data": 1, "node": 1, "expert": 1}


@pytest.mark.parametrize("masked", [False, True])
def test_masking_documents_reaches_attention(masked):
    """Segments are compared in the step of a recipe that masks documents, and in no other."""
    trainer = make_trainer(recipe(mask_documents=masked, precision=FLOAT32))
    seen = []

    def watched(dispatcher):
        model = real(dispatcher)

        def context(batch):
            ctx = model.context(batch)
            seen.append(ctx.segment_ids is not None)
            return ctx

        return dataclasses.replace(model, context=context)

    real, trainer.staged = trainer.staged, watched
    jax.eval_shape(trainer._sharded_step, abstract_state(trainer), full(MODEL, 2, 16), hyperparameters())
    assert set(seen) == {masked}
