"""Measures a pipelined step's temporary memory, for `tools.bench.pipeline`."""

from __future__ import annotations

import dataclasses

from deepseek_jax.config import ModelConfig
from tools.bench.pipeline_cases import lowered, make_trainer, model_of


def measure_memory(ranks: str, microbatches: str, schedule: str, overlap: str) -> dict:
    """Bytes of temporaries that XLA plans for a device, and what the schedule says that it must hold."""
    from deepseek_jax.parallel.mesh import ParallelConfig
    from deepseek_jax.parallel.pipeline.tables import make_tables
    from deepseek_jax.planning.gpu_target import h200_mesh
    from deepseek_jax.planning.pipeline_memory import pipeline_memory

    config = memory_model(int(ranks))
    mesh = h200_mesh(ParallelConfig(pipe=int(ranks), schedule=schedule))
    trainer = make_trainer(
        config,
        pipe=int(ranks),
        schedule=schedule,
        devices=list(mesh.devices.flat),
        overlap=overlap,
        recompute="selective",
    )
    plan = lowered(trainer, int(microbatches), 1024).compile().memory_analysis()
    tables = make_tables(trainer.schedule.make(int(microbatches)))
    expected = pipeline_memory(tables, stage_bytes(trainer, (int(microbatches), 1025)))
    return {"temporaries": plan.temp_size_in_bytes, **dataclasses.asdict(expected), "total": expected.total}


def stage_bytes(trainer, shape: tuple[int, int]):
    """`StageBytes` of a trainer's stages, traced for a global batch of this shape."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.pipeline.protocol import LossScales
    from deepseek_jax.parallel.pipeline.stage import Stage
    from deepseek_jax.parallel.pipeline.tables import make_tables
    from deepseek_jax.parallel.pipeline.ticks import Machine, _Run
    from deepseek_jax.parallel.sharding import BATCH_SPEC
    from deepseek_jax.planning.memory import layer_activations
    from deepseek_jax.planning.pipeline_memory import StageBytes
    from deepseek_jax.training.sharding_table import abstract_state

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    found = []

    def device(state, batch):
        microbatches, _ = trainer._microbatches(batch, trainer.dispatchers(shape)[0])
        schedule = trainer.schedule.make(trainer.microbatches(shape))
        staged = Stage(trainer.staged(trainer.dispatchers(shape)[0]), trainer.config.recompute)
        machine = Machine(staged, schedule, trainer.placement.occupied())
        scales = LossScales(*(jnp.zeros((), jnp.float32) for _ in LossScales._fields))
        run = _Run(machine, make_tables(schedule), *trainer._local_weights(state), microbatches, scales)
        totals, shapes = run._no_totals(), run.shapes
        tokens = jax.tree.leaves(microbatches)[0].shape[1] * (shape[1] - 1)
        layer = layer_activations(trainer.model.config, dense=False) * tokens
        found.append(
            StageBytes(
                x=size(shapes.out.x),
                output=size(shapes.out.hidden),
                residual=size(shapes.residual),
                stash=size(shapes.stash),
                weights=size(run.weights) // schedule.stages.slots,
                gradients=size(totals.stacks) // schedule.stages.slots,
                ends=size(run.ends),
                ends_gradients=size((totals.ends, totals.shared)),
                layer=layer * jax.tree.leaves(shapes.out.x)[0].dtype.itemsize,
            )
        )
        return jnp.zeros(())

    batch = Microbatch(*[jax.ShapeDtypeStruct(shape, jnp.int32)] * len(Microbatch._fields))
    specs = (trainer.state_specs(), BATCH_SPEC)
    mapped = jax.shard_map(device, mesh=trainer.mesh, in_specs=specs, out_specs=jax.P())
    jax.eval_shape(mapped, abstract_state(trainer), batch)
    return found[0]


def memory_model(ranks: int) -> ModelConfig:
    """One large enough for its arrays to outweigh what the compiler keeps besides."""
    return dataclasses.replace(model_of(2, hidden=1024), num_layers=4 * ranks, vocab_size=8192)
