"""Every schedule takes the steps of one device, over real blocks: losses, gradients, loads and biases.

MLA, MoE with exchanges, balance loss, dense layers, MTP; stages of unequal depth, short last microbatches, evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import NamedSharding
from small_model import abstract_state, assert_same_metrics, gradient_descent, hyperparameters, packed, quickly, small

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.tables import make_tables
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.training import canonical
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig

CONFIG = small(num_layers=17, num_dense_layers=2, mtp_depth=1)
DEEPER = dataclasses.replace(CONFIG, mtp_depth=2, tie_embeddings=True)
LENGTH, RATE = 12, 0.2
SCHEDULES = (
    "gpipe", "one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"
)  # fmt: skip
MESHES = {2: {"data": 2, "expert": 2}, 4: {"expert": 2}, 8: {}}
SAMPLE = {("dualpipe", 2, "steady"), ("zb_h1", 4, "off"), ("dualpipe_v", 2, "off")}
CASES = [(name, pipe, "off") for name in SCHEDULES for pipe in MESHES]
CASES += [(name, pipe, how) for name in ("dualpipe", "dualpipe_v", "eager_one_f_one_b") for pipe in (2, 4)
          for how in ("steady", "braid")]  # fmt: skip
CASES += [("dualpipe", 8, "braid")]


def cases():
    """Every schedule, size and way; the slow mark leaves a sample."""
    for case in CASES:
        yield pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow, id="-".join(map(str, case)))


@pytest.fixture(autouse=True)
def let_programs_go():
    """All of them together would map more memory than a process may (`vm.max_map_count`)."""
    yield
    jax.clear_caches()


def make(parallel: ParallelConfig, config=CONFIG, *, dtype=jnp.float64, optimizer=gradient_descent, **step) -> Trainer:
    mesh = make_mesh(parallel, jax.devices()[: np.prod(parallel.shape)])
    placement = place(config, parallel.layers_per_stage, stage_map=parallel.schedule_choice.stage_map)
    step = {"compute_dtype": dtype, "balance_weight": 0.01, "microbatch_rows": parallel.microbatch_rows} | step
    options = StepConfig(schedule=parallel.schedule, put_off=parallel.put_off, overlap=parallel.overlap, **step)
    return quickly(Trainer(Transformer(config), placement, mesh, optimizer, options))


def batch_of(trainer: Trainer, rows: int, seed: int = 0, config=CONFIG):
    """Packed documents, then as many empty rows as the trainer needs: the last microbatches are short."""
    documents = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
    filled = [documents[(row + seed) % 8] for row in range(rows)]
    filled += [[]] * (trainer.padded_rows(rows) - rows)
    return jax.device_put(packed(config, filled, length=LENGTH, seed=seed), NamedSharding(trainer.mesh, BATCH_SPEC))


def course(trainer: Trainer, rows: int, *, steps: int = 2, dtype=jnp.float64, config=CONFIG):
    """Metrics of each step, a later evaluation, and the canonical arrays at the end."""
    state = trainer.fresh_state(trainer.params_layout.initial(0, dtype), trainer.bias_layout.initial(0, dtype))
    hyper = hyperparameters(learning_rate=RATE, bias_rate=0.01, dtype=dtype)
    seen = []
    for seed in range(steps):
        state, metrics = trainer.step(state, batch_of(trainer, rows, seed, config), hyper)
        seen.append(jax.tree.map(np.asarray, metrics))
    evaluated = trainer.evaluate(state, batch_of(trainer, rows, steps, config))
    arrays = {name: np.asarray(array) for name, array in canonical.to_canonical(trainer, state).items()}
    return seen, [float(value) for value in evaluated], arrays


@functools.cache
def one_device(rows: int, config=CONFIG):
    return course(make(ParallelConfig(), config), rows, config=config)


def assert_same_course(trainer: Trainer, rows: int, config=CONFIG):
    """Loads and biases exactly; losses, norms, parameters (so gradients) and evaluation to 1e-9."""
    seen, evaluated, arrays = course(trainer, rows, config=config)
    wanted, wanted_evaluation, wanted_arrays = one_device(rows, config)
    assert_same_metrics(seen, wanted)
    np.testing.assert_allclose(evaluated, wanted_evaluation, rtol=1e-9)
    assert arrays.keys() == wanted_arrays.keys()
    for name, value in wanted_arrays.items():
        if name.endswith("router.bias"):
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(arrays[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("name", "pipe", "overlap"), cases())
def test_a_schedule_takes_the_steps_of_one_device(name, pipe, overlap):
    """Two steps and an evaluation in float64, of batches whose last microbatches are empty."""
    parallel = ParallelConfig(pipe=pipe, **MESHES[pipe], schedule=name, overlap=overlap, microbatch_rows=1)
    with jax.enable_x64(True):
        trainer = make(parallel)
        # So many that schedules of two slots have steady ticks.
        rows = 4 * pipe * parallel.batch_shards - 1
        assert_same_course(trainer, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pipe", "put_off"), [("dualpipe", 4, 0), ("dualpipe", 4, 1), ("zb_h1", 4, 1)])
def test_fewer_weight_gradients_that_wait_change_nothing(name, pipe, put_off):
    parallel = ParallelConfig(pipe=pipe, expert=2, schedule=name, put_off=put_off, microbatch_rows=1)
    with jax.enable_x64(True):
        assert_same_course(make(parallel), 4 * pipe * parallel.batch_shards - 1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_recomputed_changes_nothing(recompute):
    parallel = ParallelConfig(pipe=2, node=2, expert=2, microbatch_rows=2, overlap="steady")
    with jax.enable_x64(True):
        assert_same_course(make(parallel, recompute=recompute), 31)


@pytest.mark.slow
def test_stages_as_the_user_cuts_them_and_two_mtp_modules():
    """A first stage of dense layers alone, a last one of MTP modules and one layer, in tails of two slots; and one
    matrix for both ends, which gets gradients from both."""
    parallel = ParallelConfig(pipe=4, data=2, layers_per_stage=(2, 6, 8, 1), microbatch_rows=1)
    with jax.enable_x64(True):
        assert_same_course(make(parallel, DEEPER), 16, DEEPER)


OWN = """
schedule own
stages straight
ranks 2
microbatches 4
rank 0: F0.0 F0.1 F0.2 B0.0 F0.3+B0.1+W0.0 B0.2+W0.1 B0.3+W0.2 W0.3
rank 1: F0.0 B0.0 F0.1 B0.1+W0.0 F0.2 B0.2+W0.1 F0.3 B0.3+W0.2 W0.3
"""
"""Every B but the first beside the W of the microbatch before, which no generator does."""


@pytest.mark.slow
def test_an_own_schedule_with_a_weight_gradient_beside_the_next_input_gradient(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(OWN)
    with jax.enable_x64(True):
        assert_same_course(make(ParallelConfig(pipe=2, expert=2, schedule=str(path), microbatch_rows=2)), 15)


@pytest.mark.slow
def test_a_float32_step_agrees():
    """One step to 1e-5; later ones part, since one flipped choice changes all after it."""
    with jax.enable_x64(False):
        parallel = ParallelConfig(pipe=2, data=2, expert=2, microbatch_rows=1)
        (many,), _, arrays = course(make(parallel, dtype=jnp.float32), 16, steps=1, dtype=jnp.float32)
        (one,), _, expected = course(make(ParallelConfig(), dtype=jnp.float32), 16, steps=1, dtype=jnp.float32)
    np.testing.assert_array_equal(many.load, one.load)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_bfloat16_step_agrees():
    """Of losses 1e-3, of the norm of the gradient 2e-2: bfloat16 has 8 bits, and sums are in other orders."""
    parallel = ParallelConfig(pipe=2, data=2, expert=2, microbatch_rows=1)
    (many,), _, _ = course(make(parallel, dtype=jnp.bfloat16), 16, steps=1, dtype=jnp.float32)
    (one,), _, _ = course(make(ParallelConfig(), dtype=jnp.bfloat16), 16, steps=1, dtype=jnp.float32)
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-3)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=2e-2)


# --- the program ------------------------------------------------------------------------------------------------------

ONLY_MOE = small(num_layers=8, num_dense_layers=0, mtp_depth=0)
"""Without what stands in conditionals of its own: dense layers, and the join of an MTP module."""


@functools.cache
def program(overlap: str, microbatches: int):
    """The jaxpr of a DualPipe step over four ranks and experts on two devices."""
    parallel = ParallelConfig(pipe=4, expert=2, overlap=overlap, microbatch_rows=1)
    trainer = make(parallel, ONLY_MOE, dtype=jnp.float32)
    batch = packed(ONLY_MOE, [[13]] * (2 * microbatches), length=LENGTH)
    step = jax.make_jaxpr(trainer._sharded_step, static_argnums=3)
    return step(abstract_state(trainer), batch, hyperparameters(), 0).jaxpr


def equations(jaxpr):
    """All equations, with those of inner programs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def bodies(jaxpr, length: int) -> list:
    """Bodies of the scans over ticks, of which all together have so many: those that send over `pipe`."""
    scans = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
    found = [one for one in scans if any(e.primitive.name == "ppermute" for e in one.params["jaxpr"].jaxpr.eqns)]
    assert sum(one.params["length"] for one in found) == length
    return [one.params["jaxpr"].jaxpr for one in found]


def named(jaxpr, name: str) -> list:
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == name]


def test_the_program_does_not_grow_with_the_batch():
    """As many equations for 16 microbatches as for 64; three bodies of ticks with a steady one, else one."""
    for overlap in ("off", "steady"):
        assert len(list(equations(program(overlap, 16)))) == len(list(equations(program(overlap, 64))))
    tables = make_tables(make_schedule("dualpipe", 4, 16))
    (start, end, period), ticks = tables.steady[:3], tables.ticks
    assert len(bodies(program("off", 16), ticks)) == 1
    assert len(bodies(program("steady", 16), ticks - (end - start) + (end - start) // period)) == 3


def steady_body():
    tables = make_tables(make_schedule("dualpipe", 4, 16))
    assert tables.steady.period == 2
    return bodies(program("steady", 16), tables.ticks - (tables.steady.end - tables.steady.start) // 2)[1]


def test_steady_ticks_have_no_conditional_and_one_message_each_way():
    """Two ticks of MoE layers: an activation and a gradient are sent in each, along known pairs of ranks."""
    body = steady_body()
    layers = [inner for eqn in body.eqns if eqn.primitive.name == "scan" for inner in jaxprs_in_params(eqn.params)]
    # Deeper ones are of the blocked grouped matmul, which only CPUs use.
    assert not [eqn for one in (body, *layers) for eqn in one.eqns if eqn.primitive.name in ("cond", "while")]
    generic = bodies(program("off", 16), make_tables(make_schedule("dualpipe", 4, 16)).ticks)[0]
    maybe = collections.Counter(eqn.primitive.name for eqn in generic.eqns)
    assert maybe["cond"] == 1, "the embedding"
    assert maybe["while"] == 6, "F, a full backward, B, W, head and the embedding's gradient, which add to something"
    assert len(named(body, "ppermute")) == 4, "two ticks with an activation and a gradient"
    assert len(named(generic, "ppermute")) == 4, "one tick with both of them both ways"


def test_forward_and_backward_of_a_steady_tick_are_independent():
    """No value of the scan over F's layers is read on the way to B's, nor the other way round."""
    body = steady_body()
    exchanging = [e for e in body.eqns if e.primitive.name == "scan" and named(e.params["jaxpr"].jaxpr, "all_to_all")]
    assert len(exchanging) == 4, "F and B of two ticks"
    for first, second in (exchanging[:2], exchanging[2:]):
        reached = set(first.outvars)
        for eqn in body.eqns[body.eqns.index(first) + 1 : body.eqns.index(second) + 1]:
            if any(variable in reached for variable in eqn.invars if isinstance(variable, Var)):
                assert eqn is not second
                reached.update(eqn.outvars)


def test_no_ring_comes_out_of_a_conditional():
    """XLA would copy it in every tick."""
    tables = make_tables(make_schedule("dualpipe", 4, 16))
    (body,) = bodies(program("off", 16), tables.ticks)
    out = {variable.aval.shape for eqn in body.eqns if eqn.primitive.name == "cond" for variable in eqn.outvars}
    rows = tables.rings.residual + 1
    rings = {variable.aval.shape for variable in body.invars if variable.aval.shape[:1] == (rows,)}
    assert len(rings) > 10
    assert not rings & out


def test_a_pipelined_step_without_room_changes_nothing_and_runs_again():
    """Too little room in any tick of any rank leaves the state bit for bit, and the next setting has enough."""
    parallel = ParallelConfig(pipe=2, expert=4, microbatch_rows=1, schedule="one_f_one_b")
    trainer = make(parallel, ONLY_MOE, dtype=jnp.float32, capacity=1.0)
    bias = np.where(np.arange(8) < 2, 0.0, -100.0)  # all tokens to the two experts of one device
    state = trainer.fresh_state(trainer.params_layout.initial(0), trainer.bias_layout.initial(0))
    skewed = jax.tree.map(
        lambda b: jax.device_put(np.broadcast_to(bias, b.shape).astype(b.dtype), b.sharding), state.router_bias
    )
    state = dataclasses.replace(state, router_bias=skewed)
    before = jax.tree.map(np.array, state)
    batch = batch_of(trainer, 16, config=ONLY_MOE)
    state, metrics = trainer._step(state, batch, hyperparameters(), 0)
    assert int(metrics.lost) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)
    state, metrics = trainer.step(state, batch, hyperparameters())
    assert (int(metrics.lost), int(state.step)) == (0, 1)
