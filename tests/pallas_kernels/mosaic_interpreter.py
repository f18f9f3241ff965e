"""Runs a kernel for Hopper on a CPU by Pallas' interpreter, which also looks for data races."""

import jax
import jax.numpy as jnp
import numpy as np


def parameters(uninitialized="zero"):
    """Pallas' `InterpretGPUParams`.

    TMA reads zeros beyond the end of an array, as the interpreter is told to; `uninitialized` is also what fresh memory
    holds.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory=uninitialized
    )


def interpret(kernel, *args, uninitialized="zero", **options):
    """What `kernel(*args, interpret=…, **options)` returns, after a check that no access of shared memory raced with
    another."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    interpreter.reset_gpu_interpret_mode_state()  # A test that failed before may have left some.
    out = jax.block_until_ready(kernel(*args, interpret=parameters(uninitialized), **options))
    jax.effects_barrier()  # The interpreter's callbacks, which note the races.
    assert not interpreter.get_races().races_found
    return out


def run(kernel, *args, **options):
    """The same, its leaves in float32 of NumPy."""
    out = interpret(kernel, *args, **options)
    return jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32)), out)
