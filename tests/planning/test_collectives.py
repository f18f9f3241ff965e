"""Collectives read off a jaxpr: programs whose counts are known by hand, then the train step of a small model."""

from __future__ import annotations

import collections
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from small_model import gradient_descent, small

from deepseek_jax.compat import to_varying
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.placement import place
from deepseek_jax.planning.collectives import Collective, collectives, total_sent
from deepseek_jax.training.sharding_table import abstract_mesh, step_collectives
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.tree import flatten

MESH = AbstractMesh((2, 4, 1), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def found(function, *shapes, dtype=jnp.float32, shares=None) -> tuple[Collective, ...]:
    """The collectives of per-device code on arrays of these global shapes, split eight ways."""
    split = jax.shard_map(
        lambda *arrays: to_varying(function(*arrays), ("a", "b", "c")),
        mesh=MESH,
        in_specs=tuple(P(("a", "b")) for _ in shapes),
        out_specs=P(("a", "b", "c")),
    )
    return collectives(jax.make_jaxpr(split)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)), shares)


def one(*arguments, **settings) -> Collective:
    (only,) = found(*arguments, **settings)
    return only


# --- kinds and bytes ------------------------------------------------------------------------------------------------

permutation = functools.partial(lax.ppermute, axis_name="b", perm=[(i, (i + 1) % 4) for i in range(4)])


@pytest.mark.parametrize(
    ("function", "kind", "axes", "sent"),
    [
        (lambda x: lax.psum(x, "b"), "all_reduce", ("b",), 2 * 3 / 4),
        (lambda x: lax.pmax(x, "b"), "all_reduce", ("b",), 2 * 3 / 4),
        (lambda x: lax.psum(to_varying(x, "c"), ("a", "b", "c")), "all_reduce", ("a", "b"), 2 * 7 / 8),
        (lambda x: lax.all_gather(x, "b", tiled=True), "all_gather", ("b",), 3),
        (lambda x: lax.psum_scatter(x, ("a", "b"), tiled=True), "reduce_scatter", ("a", "b"), 7 / 8),
        (lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), "all_to_all", ("b",), 3 / 4),
        (permutation, "permute", ("b",), 1),
    ],
    ids=["psum", "pmax", "psum-several", "all_gather", "psum_scatter", "all_to_all", "ppermute"],
)
def test_each_kind_and_what_a_device_sends(function, kind, axes, sent):
    """The formulas of the module, for 16 rows of 3 float32 on each device."""
    only = one(function, (128, 3))
    assert (only.kind, only.axes, only.calls, only.input_bytes) == (kind, axes, 1, 16 * 3 * 4)
    assert only.bytes_sent == sent * 16 * 3 * 4
    assert (only.shape, only.dtype) == ((16, 3), "float32")


def test_a_ragged_exchange_counts_its_rows_alone():
    """Not the buffer for what comes, nor the tables of offsets and sizes."""

    def exchange(x):
        offsets = to_varying(jnp.arange(4, dtype=jnp.int32), ("a", "b"))
        sizes = to_varying(jnp.ones(4, jnp.int32), ("a", "b"))
        room = to_varying(jnp.zeros((9, 3), x.dtype), ("a", "b"))
        return lax.ragged_all_to_all(x, room, offsets, sizes, offsets, sizes, axis_name="b")

    only = one(exchange, (128, 3), dtype=jnp.bfloat16)
    assert (only.kind, only.input_bytes, only.bytes_sent) == ("ragged_all_to_all", 16 * 3 * 2, 16 * 3 * 2 * 3 // 4)


def test_nothing_is_sent_along_an_axis_of_one():
    assert found(lambda x: lax.psum(to_varying(x, "c"), "c"), (8,)) == ()


# --- how often ------------------------------------------------------------------------------------------------------


def test_a_scan_counts_as_often_as_it_repeats():
    def inner(x, _):
        return lax.ppermute(x, "b", [(0, 1)]), None

    def outer(x, _):
        return lax.all_to_all(lax.scan(inner, x, None, length=3)[0], "a", 0, 0, tiled=True), None

    calls = {one.kind: one.calls for one in found(lambda x: lax.scan(outer, x, None, length=5)[0], (16,))}
    assert calls == {"permute": 15, "all_to_all": 5}


def test_of_two_branches_the_one_that_sends_more_counts():
    def function(x):
        return lax.cond(x[0] > 0, lambda x: lax.ppermute(x, "b", [(0, 1)]), lambda x: lax.psum(x, "b") + 0 * x, x)

    assert one(function, (16,)).kind == "all_reduce"


def test_a_while_loop_is_refused():
    """It says nowhere how often it runs; without collectives it is no matter."""

    def loop(step):
        return lambda x: lax.while_loop(lambda x: x.sum() > 0, step, x)

    assert found(loop(lambda x: x - 1), (16,)) == ()
    with pytest.raises(ValueError, match=r"permute over .* in a while loop"):
        found(loop(lambda x: lax.ppermute(x, "b", [(0, 1)])), (16,))


# --- passes and purposes --------------------------------------------------------------------------------------------


def sent_there(x):
    with jax.named_scope("outer"), jax.named_scope("there"):
        return lax.all_to_all(x, "b", 0, 0, tiled=True)


def passes(function, name="sent"):
    """(purpose, pass) of each call in the gradient of a function that is computed again but for what has a name."""
    policy = jax.checkpoint_policies.save_only_these_names(name)
    layer = jax.checkpoint(function, policy=policy, prevent_cse=False)

    def gradient(x):
        return jax.grad(lambda x: lax.scan(lambda x, _: (layer(x), None), x, None, length=6)[0].sum())(x)

    counted: collections.Counter = collections.Counter()
    for one in found(gradient, (32,)):
        counted[one.purpose, one.phase] += one.calls
    return counted


def test_what_is_computed_again_is_told_from_what_is_not():
    """The sine's backward pass needs what was sent: kept under its name, or sent again."""
    forward_and_back = {("there", "forward"): 6, ("there", "backward"): 6}
    assert passes(lambda x: jnp.sin(checkpoint_name(sent_there(x), "sent"))) == forward_and_back
    assert passes(lambda x: jnp.sin(sent_there(x))) == forward_and_back | {("there", "recomputed"): 6}


def test_a_custom_backward_pass_is_the_backward_pass():
    @jax.custom_vjp
    def send(x):
        return sent_there(x)

    send.defvjp(lambda x: (send(x), None), lambda _, g: (lax.all_gather(g, "b").sum(0),))
    counted = {(one.kind, one.phase): one.calls for one in found(jax.grad(lambda x: send(x).sum()), (32,))}
    assert counted == {("all_to_all", "forward"): 1, ("all_gather", "backward"): 1}


def test_outside_of_a_gradient_there_is_no_pass():
    assert (one(sent_there, (32,)).purpose, one(sent_there, (32,)).phase) == ("there", "")
    assert one(lambda x: lax.psum(x, "a"), (32,)).purpose == ""


# --- the train step -------------------------------------------------------------------------------------------------

ROWS, LENGTH = 1, 16
"""Of a microbatch on one device."""


@functools.cache
def step_of(
    microbatches=2, mtp_depth=1, node=1, expert=4, pipe=1, **settings
) -> tuple[Trainer, tuple[Collective, ...]]:
    """A trainer of one dense and two MoE layers, and the collectives of its step."""
    config = small(mtp_depth=mtp_depth)
    parallel = ParallelConfig(pipe=pipe, data=2, node=node, expert=expert)
    settings = {"microbatch_rows": ROWS, "compute_dtype": jnp.bfloat16} | settings
    trainer = Trainer(
        Transformer(config),
        place(config, stage_map=parallel.schedule_choice.stage_map),
        abstract_mesh(parallel),
        gradient_descent,
        StepConfig(**settings),
    )
    rows = parallel.batch_shards * ROWS * microbatches
    return trainer, step_collectives(trainer, (rows, LENGTH + 1))


def exchanges(found: tuple[Collective, ...]) -> dict:
    """Calls by axes, purpose and pass of what moves tokens."""
    counted: collections.Counter = collections.Counter()
    for one in found:
        if "all_to_all" in one.kind:
            counted["·".join(one.axes), one.purpose, one.phase] += one.calls
    return dict(counted)


def expected(*hops: str, times: int) -> dict:
    """One exchange of choices, and there and back of rows; weights travel with them, and so do both's gradients."""
    parts = {
        ("dispatch_plan", "forward"): 1,
        ("dispatch", "forward"): 2,
        ("combine", "forward"): 1,
        ("combine", "backward"): 1,
        ("dispatch", "backward"): 2,
    }
    return {(hop, *part): count * times for hop in hops for part, count in parts.items()}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_tokens_and_choices_travel_once(recompute, mtp_depth):
    """Of two MoE layers, an MTP module and two microbatches. The backward pass sends gradients and nothing again."""
    found = step_of(recompute=recompute, mtp_depth=mtp_depth)[1]
    assert exchanges(found) == expected("expert", times=2 * (2 + mtp_depth))


def test_with_two_hops_each_is_taken_as_often():
    found = step_of(mtp_depth=0, node=2, expert=2)[1]
    assert exchanges(found) == expected("node", "expert", times=2 * 2)


def test_full_recomputation_sends_all_again_but_what_no_gradient_needs():
    """Choices and rows; a layer's output, which its combine makes, is the next layer's input and kept."""
    again = {("expert", "dispatch_plan", "recomputed"): 4, ("expert", "dispatch", "recomputed"): 8}
    assert exchanges(step_of(mtp_depth=0, recompute="full")[1]) == expected("expert", times=4) | again


def test_a_call_sends_the_rows_that_the_buffers_have_room_for():
    """1.5 times an even share of T K / R rows for each of R devices, in whole eights."""
    trainer, found = step_of(mtp_depth=0)
    (hop,) = trainer.dispatchers((2 * 4 * ROWS * 2, LENGTH + 1))[0].hops
    rows = {one.shape for one in found if one.purpose == "combine"}
    assert rows == {(4 * hop.capacity, trainer.model.config.hidden_size)}
    assert {one.dtype for one in found if one.purpose == "combine"} == {"bfloat16"}


def by_kind(found, kind: str) -> list[Collective]:
    return [one for one in found if one.kind == kind]


def test_each_weight_is_gathered_once_and_each_gradient_reduced_once():
    """ZeRO-1: in the compute dtype and in float32, whatever the number of microbatches; vectors are summed whole."""
    trainer, found = step_of()
    splits = [split for split in flatten(trainer.params_layout.splits()).values() if split is not None]
    gathered, scattered = by_kind(found, "all_gather"), by_kind(found, "reduce_scatter")
    assert sum(one.calls for one in gathered) == sum(one.calls for one in scattered) == len(splits)
    assert {one.dtype for one in scattered} == {"float32"}
    assert {one.dtype for one in gathered} == {"bfloat16", "float32"}, "the router's are kept in full precision"
    whole = sum(one.calls * one.input_bytes for one in scattered)
    wide = sum(one.calls * one.input_bytes * one.ranks * 4 // jnp.dtype(one.dtype).itemsize for one in gathered)
    assert whole == wide, "a gradient has its weight's shape"


def test_only_tokens_travel_with_every_microbatch():
    one_microbatch, three = step_of(microbatches=1)[1], step_of(microbatches=3)[1]
    for kind, times in {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 1, "all_to_all": 3}.items():
        calls = [sum(one.calls for one in by_kind(found, kind)) for found in (one_microbatch, three)]
        assert calls[1] == times * calls[0] > 0, kind


def test_without_experts_on_other_devices_no_token_travels():
    found = step_of(expert=1)[1]
    assert exchanges(found) == {}
    assert {one.axes for one in found} == {("data",)}


def test_a_split_vocabulary_is_summed_over_pipe():
    """In the ticks that the table names. The embedding once a microbatch, and again where it is differentiated; both
    its gradients and both hidden states, of the model and of its MTP module, once from the rank that has them; and the
    gradient of what the head reads, for both losses."""
    counted: collections.Counter = collections.Counter()
    for one in step_of(pipe=2, expert=1, schedule="one_f_one_b")[1]:
        if one.kind == "all_reduce" and one.axes == ("pipe",) and one.input_bytes >= LENGTH * 24 * 2:
            counted[one.purpose] += one.calls
    assert counted == {"lookup": 2 * 2, "embed_gradient": 2 * 2, "head": 2 * 2, "cross_entropy": 2 * 2}


def test_conditionals_count_as_often_as_they_are_taken():
    """Those of one tick of three, named by their scope."""

    def ticks(x):
        def tick(x, taken):
            with jax.named_scope("F"):
                return lax.cond(taken, lambda x: to_varying(lax.psum(x, "a"), ("a",)), lambda x: x, x), None

        return lax.scan(tick, x, jnp.array([True, False, False]))[0]

    assert one(ticks, (32,)).calls == 3
    assert one(ticks, (32,), shares={"F": Fraction(1, 3)}).calls == 1


def test_every_collective_of_a_step_says_what_it_is_for():
    """By `jax.named_scope`, which profiles show too."""
    for settings in ({}, {"node": 2, "expert": 2}, {"pipe": 2, "expert": 1, "microbatches": 4}):
        assert [one for one in step_of(**settings)[1] if not one.purpose] == []


def test_a_step_sends_what_its_collectives_send():
    found = step_of()[1]
    assert total_sent(found) == sum(one.bytes_sent for one in found) > 0
