"""The backward pass of a stage in two parts: B gives the gradient of its input, W that of its weights, later.

No product, loop, kernel or exchange runs twice and the model knows nothing of it. `jax.vjp` of the stage is traced
once, and its list of equations is cut: those that the input's gradient needs are B; what the weights' gradients need
besides is W; values that cross the cut are the *stash*. So that it is small, B also does cheap work of W (the sums that
are norms' weight gradients), and W does cheap work of B again. Scans over layers and conditionals that both parts need
are cut inside (`cut.py`). A `while` loop is not cut: it belongs to B if B needs any of it. So a custom VJP must compute
the gradients of inputs and of weights in calls of their own, as `ops.grouped_matmul` does.

What is kept between the passes is as little as that allows (`residuals.py`). All of it, and weights and their gradients
too, may be a row of a stack, which is read and written where it lies (`evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from deepseek_jax.parallel.pipeline.cut import cut
from deepseek_jax.parallel.pipeline.evaluate import Row, evaluate
from deepseek_jax.parallel.pipeline.parts import pruned
from deepseek_jax.parallel.pipeline.program import Variable, flatten
from deepseek_jax.parallel.pipeline.residuals import divide

Arrays = list[jax.Array]


class SplitVjp(NamedTuple):
    """A function's forward pass and its backward pass, whole or in two parts.

    `params` and `fixed` must be the same in all of them. Residuals and stash are arrays in an order of their own. In
    the place of every array of `params`, residuals and stash may be a `Row`, and with `into`, a list or a tree of rows
    for what a part gives last, it gives the stacks of these rows, with that written in them.
    """

    forward: Callable[..., tuple[Any, Any, Arrays]]
    """`(params, x, fixed, into=None) -> (outputs, aux, residuals)`."""
    input_gradient: Callable[..., tuple[Any, Arrays]]
    """`(params, fixed, residuals, cotangents of outputs, into=None) -> (gradient of x, stash)`."""
    weight_gradient: Callable[..., Any]
    """`(params, fixed, residuals, stash, into=None) -> gradient of params`."""
    gradients: Callable[..., tuple[Any, Any]]
    """`(params, fixed, residuals, cotangents of outputs, into=None) -> (gradient of x, gradient of params)`: both at
    once, with no stash between them."""


def split_vjp(function: Callable[[Any, Any, Any], tuple[Any, Any]], params: Any, x: Any, fixed: Any = None) -> SplitVjp:
    """Traces `function(params, x, fixed) -> (outputs, aux)` and cuts its backward pass.

    Inside `shard_map`, call it inside, with arrays that vary along the axes along which they will. Weights that do not
    vary get gradients that are sums over devices, and those are part of W.

    Args:
      function: what a stage computes. `outputs` are any pytree of floats, `aux` any pytree that has no gradient.
      params: its weights, or arrays like them: a pytree of floats that is to have gradients.
      x: its input, or arrays like it: a pytree of floats that is to have gradients.
      fixed: what else it reads, of any dtype and without gradients, and is there again for the backward pass.
    """
    trees: dict[str, Any] = {}
    leaves = jax.tree.leaves
    structures = [jax.tree.structure(tree) for tree in (params, x)]
    weights, inputs = len(leaves(params)), len(leaves(x))

    def pull(residuals, cotangents):
        dparams, dx = jax.tree.unflatten(trees["pullback"], residuals)(cotangents)
        return leaves(dx), leaves(dparams)

    def traced(params, x, fixed):
        outputs, pullback, aux = jax.vjp(lambda params, x: function(params, x, fixed), params, x, has_aux=True)
        residuals, trees["pullback"] = jax.tree.flatten(pullback)
        # Traced here, where the residuals are, so that both traces agree on where values vary.
        trees["backward"] = jax.make_jaxpr(pull)(residuals, outputs)
        trees["outputs"], trees["aux"] = jax.tree.structure(outputs), jax.tree.structure(aux)
        return leaves(outputs), leaves(aux), residuals

    whole = flatten(jax.make_jaxpr(traced)(params, x, fixed))
    backward = flatten(trees["backward"])
    counts = trees["outputs"].num_leaves, trees["aux"].num_leaves
    results, made = whole.outputs[: sum(counts)], whole.outputs[sum(counts) :]
    lasting = (*whole.inputs[:weights], *whole.inputs[weights + inputs :])
    kept, again_ops = divide(whole, made, lasting)
    forward_ops = pruned(whole.ops, (*results, *kept))
    parts = cut(
        backward,
        [place < inputs for place in range(len(backward.outputs))],
        [place < len(made) for place in range(len(backward.inputs))],
    )

    def run_forward(params, x, fixed, into=None):
        env = dict(whole.constants) | dict(zip(whole.inputs, leaves((params, x, fixed)), strict=True))
        values = evaluate(forward_ops, env, (*results, *kept), _after(results, into))
        outputs, rest = values[: counts[0]], values[counts[0] :]
        aux, residuals = rest[: counts[1]], rest[counts[1] :]
        return jax.tree.unflatten(trees["outputs"], outputs), jax.tree.unflatten(trees["aux"], aux), residuals

    def start(params, fixed, residuals) -> dict[Variable, Any]:
        """The values that every part of the backward pass begins with."""
        env = dict(whole.constants) | dict(zip(lasting, leaves((params, fixed)), strict=True))
        env.update(zip(kept, residuals, strict=True))
        evaluate(again_ops, env, ())
        values = [env[value] if isinstance(value, Variable) else value.val for value in made]
        return dict(backward.constants) | dict(zip(backward.inputs, values, strict=False))

    def start_with(params, fixed, residuals, cotangents) -> dict[Variable, Any]:
        env = start(params, fixed, residuals)
        env.update(zip(backward.inputs[len(made) :], leaves(cotangents), strict=True))
        return env

    def run_input(params, fixed, residuals, cotangents, into=None):
        env = start_with(params, fixed, residuals, cotangents)
        wanted = (*backward.outputs[:inputs], *parts.stash)
        values = evaluate(parts.first, env, wanted, _after(backward.outputs[:inputs], into))
        return jax.tree.unflatten(structures[1], values[:inputs]), values[inputs:]

    def run_weights(params, fixed, residuals, stash, into=None):
        env = start(params, fixed, residuals)
        env.update(zip(parts.stash, stash, strict=True))
        gradient = evaluate(parts.second, env, backward.outputs[inputs:], _after((), into))
        return jax.tree.unflatten(structures[0], gradient)

    def run_both(params, fixed, residuals, cotangents, into=None):
        env = start_with(params, fixed, residuals, cotangents)
        values = evaluate(backward.ops, env, backward.outputs, _after(backward.outputs[:inputs], into))
        dx, dparams = values[:inputs], values[inputs:]
        return jax.tree.unflatten(structures[1], dx), jax.tree.unflatten(structures[0], dparams)

    return SplitVjp(run_forward, run_input, run_weights, run_both)


def _after(others: Sequence[Any], rows: Any) -> list[Row | None] | None:
    """The rows of a tree, after None for each of the others."""
    return (
        None if rows is None else [*(None for _ in others), *jax.tree.leaves(rows, is_leaf=lambda leaf: leaf is None)]
    )
