"""Stages to split: what `split_vjp` and the braid of two of its parts are tested with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from deepseek_jax.compat import to_varying
from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.model.block import SAVED_ACTIVATIONS, Block
from deepseek_jax.model.parameters import stack
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import ExpertMesh, dispatchers
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, mesh_of
from deepseek_jax.parallel.pipeline.evaluate import rows_of
from deepseek_jax.parallel.pipeline.split_vjp import split_vjp

LAYERS, ROWS, LENGTH = 3, 2, 22
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options that halve the time to compile."""
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    num_layers=3,
    num_dense_layers=1,
    dense_ffn_size=40,
    mtp_depth=0,
    attention=AttentionConfig(
        num_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_ffn_size=16, num_groups=4, groups_per_token=2),
)


def equations(jaxpr, times=1):
    """Every equation of a jaxpr and those inside it, and how often it runs; a loop's body counts as often as a scan
    repeats it, else once."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for one in jaxprs_in_params(eqn.params):
            yield from equations(one, inner)


def products(function, *arguments) -> int:
    """FLOPs of the matrix products of a function."""
    total = 0
    for eqn, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contract], dtype=int)
            total += 2 * times * int(eqn.outvars[0].aval.size * depth)
    return total


def in_parts(function, params, x, fixed, cotangents):
    """Outputs, gradients and aux through the split, and what is kept between its parts."""
    split = split_vjp(function, params, x, fixed)
    outputs, aux, residuals = split.forward(params, x, fixed)
    dx, stash = split.input_gradient(params, fixed, residuals, cotangents)
    return outputs, split.weight_gradient(params, fixed, residuals, stash), dx, aux, (residuals, stash)


def at_once(function, params, x, fixed, cotangents):
    """The same with the whole backward pass of the split."""
    split = split_vjp(function, params, x, fixed)
    outputs, aux, residuals = split.forward(params, x, fixed)
    dx, dparams = split.gradients(params, fixed, residuals, cotangents)
    return outputs, dparams, dx, aux


UNTOUCHED = 1


def in_rows(function, params, x, fixed, cotangents):
    """The same in parts, with weights, what is kept and sums of gradients in rows of stacks: `(outputs, gradients of
    params, dx, aux)` and what is left in the other rows."""
    split = split_vjp(function, params, x, fixed)
    empty = lambda rows, tree: jax.tree.map(lambda leaf: jnp.full((rows, *leaf.shape), UNTOUCHED, leaf.dtype), tree)  # noqa: E731
    number, last = jnp.int32(0), jnp.int32(1)
    weights = rows_of(jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf]), params), last)
    residuals = jax.eval_shape(split.forward, params, x, fixed)[2]
    stash = jax.eval_shape(split.input_gradient, params, fixed, residuals, cotangents)[1]
    outputs, aux, ring = split.forward(weights, x, fixed, into=rows_of(empty(2, residuals), last))
    kept = rows_of(ring, last)
    dx, stashes = split.input_gradient(weights, fixed, kept, cotangents, into=rows_of(empty(2, stash), number))
    sums = jax.tree.map(lambda leaf: leaf.at[last].set(0), empty(2, params))
    sums = split.weight_gradient(weights, fixed, kept, rows_of(stashes, number), into=rows_of(sums, last, adds=True))
    gradients = jax.tree.map(lambda leaf: leaf[1], sums)
    others = [leaf[0] for leaf in (*ring, *jax.tree.leaves(sums))] + [leaf[1] for leaf in stashes]
    return (outputs, gradients, dx, aux), others


def whole(function, params, x, fixed, cotangents):
    """The same by `jax.vjp`."""
    outputs, pullback, aux = jax.vjp(lambda params, x: function(params, x, fixed), params, x, has_aux=True)
    return outputs, *pullback(cotangents), aux


def two_microbatches(function, params, x, fixed, cotangents):
    """A split, and what its forward pass of one microbatch and its backward pass of another are called with."""
    split = split_vjp(function, params, x, fixed)
    _, _, residuals = split.forward(params, x, fixed)
    other = jax.tree.map(lambda leaf: leaf[::-1] * 0.9, x)
    return split, (params, other, fixed), (params, fixed, residuals, cotangents)


def one_after_the_other(first, second):
    """What a braid is to equal."""
    return lambda first_arguments, second_arguments: (first(*first_arguments), second(*second_arguments))


def equal(got, expected, tolerance=1e-11):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=0.01 * tolerance), got, expected)


def recomputing(layer, recompute: str):
    """`layer` as the executor makes it."""
    if recompute == "none":
        return layer
    names = SAVED_ACTIVATIONS if recompute == "selective" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


# --- layers written by hand -------------------------------------------------------------------------------------------


def layers(params, x, fixed, remat=False):
    """`(params, x, fixed) -> ((x, sum), count)` of a scan over layers."""
    del fixed

    def layer(x, weights):
        def block(x, weights):
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"]

        y = (jax.checkpoint(block) if remat else block)(x, weights)
        return y, ((y**2).sum(), (y > 0).sum(dtype=jnp.int32))

    y, (aux, counts) = lax.scan(layer, x * params["scale"], params["layers"])
    return (y, aux.sum()), counts.sum()


def layer_arguments():
    """`(params, x, fixed, cotangents)` of it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {"scale": draw(8), "layers": {"up": draw(LAYERS, 8, 16), "down": draw(LAYERS, 16, 8)}}
    return params, draw(5, 8), None, (draw(5, 8), draw())


# --- DeepSeek-V3's blocks ---------------------------------------------------------------------------------------------


def stage_function(recompute: str, dispatcher=None, dense: bool = True):
    """`function(params, x, fixed) -> ((x, balance loss), loads)` of a stage: dense layers, if any, then MoE layers.

    `fixed` holds positions, which tokens are valid, router biases and whether this rank's stage holds dense layers.
    """
    model = Transformer(CONFIG)
    kinds = {
        "moe": nnx.graphdef(stack(Block(CONFIG), LAYERS)),
        "dense": nnx.graphdef(stack(Block(CONFIG, dense=True), 2)),
    }

    def function(params, x, fixed):
        ctx = model.context(fixed["positions"], valid=fixed["valid"], dispatcher=dispatcher, dtype=x.dtype)

        def moe(inputs, x):
            params, bias = inputs
            router = {**params["ffn"]["router"], "bias": bias}
            params = {**params, "ffn": {**params["ffn"], "router": router}}
            return nnx.merge(kinds["moe"], params)(x, ctx)

        def dense_layer(params, x):
            return nnx.merge(kinds["dense"], params)(x, ctx)[0]

        def dense_layers(x):
            return lax.scan(lambda x, p: (recomputing(dense_layer, recompute)(p, x), None), x, params["dense"])[0]

        if dense:
            x = lax.cond(fixed["has_dense"], dense_layers, lambda x: x, x)

        def step(x, inputs):
            x, aux, stats = recomputing(moe, recompute)(inputs, x)
            return x, (aux, stats.load)

        x, (aux, loads) = lax.scan(step, x, (params["moe"], fixed["bias"]))
        return (x, aux.sum()), loads

    return function


def stage_arguments(rows=ROWS, layers=LAYERS):
    """`(params, x, fixed, cotangents)` of it, as NumPy arrays: of one device."""
    rng = np.random.default_rng(0)
    params = {}
    for kind, count in (("moe", layers), ("dense", 2)):
        _, state = nnx.split(stack(Block(CONFIG, dense=kind == "dense"), count))
        params[kind] = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), nnx.to_pure_dict(state))
    fixed = {
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)),
        "valid": rng.random((rows, LENGTH)) < 0.9,
        "bias": params["moe"]["ffn"]["router"].pop("bias"),
        "has_dense": np.asarray(True),
    }
    x = rng.normal(size=(rows, LENGTH, CONFIG.hidden_size))
    return params, x, fixed, (rng.normal(size=x.shape), np.asarray(0.7))


# --- on a mesh --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one hop": (1, 4, "all_to_all", 0),
    "two hops": (2, 2, "two_hop", 0),
    "two hops, in rounds": (2, 2, "two_hop", -1),
}
"""Sizes of node and expert, a dispatcher, and which of its settings."""


def exchanges(function, *arguments) -> int:
    """How often a function's program exchanges rows between devices."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return sum(times for eqn, times in equations(jaxpr) if eqn.primitive.name == "all_to_all")


def on_mesh(layout: str, per_device, devices=None):
    """`per_device(function_of_recompute, arguments)` on pipe 2 x 4 devices that share a batch and its experts.

    Rank 0 of the pipe has dense layers, rank 1 has none. Results are stacked, a row for each device. Without devices it
    can be traced but not run. Returns the function over the mesh and its arguments.
    """
    node, expert, name, setting = LAYOUTS[layout]
    ladder = dispatchers(name, CONFIG.moe, ExpertMesh(node, expert), tokens=LENGTH, slack=1.5, alignment=4)
    dispatcher = ladder[setting]
    if devices is None:
        mesh = AbstractMesh((2, 1, node, expert), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    else:
        mesh = mesh_of(np.array(devices).reshape(2, 1, node, expert))
    params, x, fixed, cotangents = stage_arguments(4, 2)
    del fixed["has_dense"]  # each rank's own
    split = {"params": jax.tree.map(lambda _: jax.P(), params), "rows": jax.P(BATCH_AXES)}
    split["params"]["moe"]["ffn"]["experts"] = dict.fromkeys(("gate_up", "down"), jax.P(None, ("node", "expert")))
    fixed_specs = {"positions": split["rows"], "valid": split["rows"], "bias": jax.P()}

    def device(params, x, fixed, cotangents):
        arguments = to_varying((params, x, fixed, cotangents), AXES)
        arguments[2]["has_dense"] = lax.axis_index("pipe") == 0
        results = per_device(functools.partial(stage_function, dispatcher=dispatcher), arguments)
        return jax.tree.map(lambda leaf: to_varying(leaf, AXES)[None], results)

    specs = split["params"], split["rows"], fixed_specs, (split["rows"], jax.P())
    mapped = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=jax.P(AXES))
    return jax.jit(mapped), (params, x, fixed, cotangents)
