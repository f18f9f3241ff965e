"""Measures a pipelined step's temporary memory, for `tools.bench.pipeline`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.planning.memory import layer_activations
from deepseek_jax.planning.pipeline_memory import StageBytes
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
    stage = stage_bytes(trainer, (int(microbatches), 1025))
    expected = pipeline_memory(tables, stage, steady=overlap != "off")
    return {"temporaries": plan.temp_size_in_bytes, **dataclasses.asdict(expected), "total": expected.total}


def stage_bytes(trainer, shape: tuple[int, int]) -> StageBytes:
    """`StageBytes` of a trainer's stages, traced for a global batch of this shape."""
    import jax

    def read(run) -> StageBytes:
        totals, shapes = run._no_totals(), run.shapes
        slots = run.stages.slots
        layer = layer_activations(trainer.model.config, dense=False) * trainer._microbatch_tokens(shape)
        return StageBytes(
            x=bytes_of(shapes.out.x),
            output=bytes_of(shapes.out.hidden),
            residual=bytes_of(shapes.residual),
            stash=bytes_of(shapes.stash),
            weights=bytes_of(run.weights) // slots,
            gradients=bytes_of(totals.stacks) // slots,
            ends=bytes_of(run.ends),
            ends_gradients=bytes_of((totals.ends, totals.shared)),
            layer=layer * jax.tree.leaves(shapes.out.x)[0].dtype.itemsize,
        )

    return trace_run(trainer, shape, read)


def bytes_of(tree) -> int:
    """Of all arrays of a tree."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def trace_run(trainer, shape: tuple[int, int], read: Callable[[Any], Any]) -> Any:
    """What `read` says of the pipeline's `_Run` while a step is traced for a global batch of this shape."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.pipeline.protocol import LossScales
    from deepseek_jax.parallel.pipeline.stage import Stage
    from deepseek_jax.parallel.pipeline.tables import make_tables
    from deepseek_jax.parallel.pipeline.ticks import Machine, _Run
    from deepseek_jax.parallel.sharding import BATCH_SPEC
    from deepseek_jax.training.sharding_table import abstract_state

    found = []

    def device(state, batch):
        dispatcher = trainer.dispatchers(shape)[0]
        microbatches, _ = trainer._microbatches(batch, dispatcher)
        schedule = trainer.schedule.make(trainer.microbatches(shape))
        staged = Stage(trainer.staged(dispatcher), trainer.config.recompute)
        machine = Machine(staged, schedule, trainer.placement.occupied())
        scales = LossScales(*(jnp.zeros((), jnp.float32) for _ in LossScales._fields))
        found.append(read(_Run(machine, make_tables(schedule), *trainer._local_weights(state), microbatches, scales)))
        return jnp.zeros(())

    batch = Microbatch(*[jax.ShapeDtypeStruct(shape, jnp.int32)] * len(Microbatch._fields))
    specs = (trainer.state_specs(), BATCH_SPEC)
    mapped = jax.shard_map(device, mesh=trainer.mesh, in_specs=specs, out_specs=jax.P())
    jax.eval_shape(mapped, abstract_state(trainer), batch)
    return found[0]


def memory_model(ranks: int) -> ModelConfig:
    """One large enough for its arrays to outweigh what the compiler keeps besides."""
    return dataclasses.replace(model_of(2, hidden=1024), num_layers=4 * ranks, vocab_size=8192)
