"""Whole runs over pipeline stages: started, killed and resumed, moved between layouts and schedules, and refused."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import types
import zlib

import jax
import numpy as np
import pytest
import tiny_run
from small_model import full, hyperparameters
from tiny_run import LENGTH, after_step, assert_same_arrays, checkpoint, experiment, kill, quick_runs, records, train

import deepseek_jax
from deepseek_jax.config import ConfigError
from deepseek_jax.config_io import save_config
from deepseek_jax.data import Tokenizer
from deepseek_jax.inference.generate import Generator, bind_canonical
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.text import to_text
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, place
from deepseek_jax.training import canonical, loop, start
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.empty_slots import empty_slots
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment
from deepseek_jax.training.finish import GREEDY
from deepseek_jax.training.init_from import first_state
from deepseek_jax.training.progress import human_count
from deepseek_jax.training.schedules import Curve, Phase
from deepseek_jax.training.step import Trainer, TrainState
from deepseek_jax.training.step_config import step_config
from deepseek_jax.tree import flatten
from experiments import run
from tools import convert

STEPS, STOPPED_AT = 20, 10
SMALL_STEPS, SMALL, LARGE = 4, 4, 8
"""Batches grow from four rows to eight after four steps; DualPipe over two ranks and two devices each needs eight."""
RAMP = Curve(phases=(Phase(until=SMALL_STEPS * SMALL * LENGTH, value=SMALL), Phase(until=10**6, value=LARGE)))
MODEL = dataclasses.replace(tiny_run.MODEL, num_layers=4)
PROMPT = "def area("


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Twenty steps by DualPipe in two stages, with experts over two devices; and a folder for runs."""
    texts = tiny_run.write_texts(tmp_path_factory.mktemp("texts"))

    def first_devices(config):  # so many of the eight that are there
        return make_mesh(config, jax.devices()[: math.prod(config.shape)])

    schedule = dataclasses.replace(
        tiny_run.SCHEDULE, total_tokens=(SMALL_STEPS * SMALL + (STEPS - SMALL_STEPS) * LARGE) * LENGTH, batch_rows=RAMP
    )
    with quick_runs() as patch:
        patch.setattr(loop, "make_mesh", first_devices)
        patch.setattr(Trainer, "initial_state", same_everywhere)
        base = experiment(
            texts,
            model=MODEL,
            schedule=schedule,
            parallel=ParallelConfig(pipe=2, expert=2),
            checkpoint=CheckpointConfig(every_steps=5, keep_last=9),
            evaluation=EvaluationConfig(batch_rows=6, every_steps=10, samples=(PROMPT,), sample_tokens=6),
        )
        yield types.SimpleNamespace(base=base, root=tmp_path_factory.mktemp("runs"))


def same_everywhere(trainer: Trainer, seed: int) -> TrainState:
    """An initial state that is the same in any layout, without a program to compile per shape."""

    def drawn(layout: ParameterLayout):
        arrays = {}
        for name, like in layout.canonical().items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            value = np.ones(like.shape) if "scale" in name else rng.normal(size=like.shape) * MODEL.init_std
            value = np.zeros(like.shape) if name.endswith("router.bias") else value
            arrays[name] = jax.device_put(value.astype(np.float32), like.sharding)
        return layout.stack(arrays)

    return trainer.fresh_state(drawn(trainer.params_layout), drawn(trainer.bias_layout))


def laid_out(runs, **changes) -> Experiment:
    return dataclasses.replace(runs.base, parallel=ParallelConfig(**changes))


@pytest.fixture(scope="module")
def whole(runs):
    """The uninterrupted run, and what it printed."""
    folder = runs.root / "whole"
    result, printed = train(runs.base, folder)
    assert (result.status, result.step) == ("done", STEPS)
    return types.SimpleNamespace(folder=folder, printed=printed)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, whole):
    """Twenty steps under DualPipe, stopped after ten: every array, record and place in the data is as without."""
    folder = runs.root / "parts"
    with after_step(STOPPED_AT, kill(signal.SIGTERM)):
        assert train(runs.base, folder)[0].step == STOPPED_AT
    assert train(runs.base, folder, resume=True)[0].status == "done"
    (arrays, documents), (expected, theirs) = checkpoint(folder, STEPS), checkpoint(whole.folder, STEPS)
    assert_same_arrays(arrays, expected)
    assert documents["data"] == theirs["data"]
    for kind, count in (("train", STEPS), ("eval", 2)):
        assert records(folder, kind) == records(whole.folder, kind)
        assert len(records(folder, kind)) == count
    assert documents["meta"]["tokens"] == runs.base.schedule.total_tokens, "empty rows are no tokens"


def test_a_run_says_how_its_pipeline_is_laid_out(whole):
    """Schedule, stages, the memory of padding, and which batches are padded; parameters are those of the layers."""
    lines = whole.printed.splitlines()
    trained = sum(a.size for n, a in checkpoint(whole.folder, STEPS)[0].items() if not n.startswith("optimizer."))
    biases = 4 * MODEL.moe.num_experts  # three layers and the MTP module
    assert lines[0].startswith(f"{human_count(trained - biases)} parameters on ")
    assert lines[1].startswith("mesh pipe 2 x expert 2; tokens reach experts by all_to_all")
    # One slot of three kinds a stage: the second stage has no dense layer.
    assert lines[2].startswith("pipeline dualpipe over 2 ranks; stages of 3, 1 layers; empty slots hold up to 0.")
    assert lines[3] == "steps of 4 rows are padded with 4 empty ones for dualpipe"
    saved = json.loads((whole.folder / "result.json").read_text())
    assert saved["parameters"] == trained - biases


@pytest.mark.parametrize(
    "layout",
    [
        {"pipe": 2, "expert": 2},
        {"pipe": 2, "data": 2, "schedule": "dualpipe_v"},
        {"pipe": 4, "node": 2, "schedule": "zb_h1", "zero": False},
    ],
    ids=lambda layout: layout.get("schedule", "dualpipe"),
)
def test_the_memory_of_padding_is_that_of_the_zeros_in_real_stacks(runs, layout):
    """State: masters and two moments of two bytes; in a step: weights and gradients, of both directions' stages."""
    trainer = loop.make_trainer(laid_out(runs, **layout))

    def zeros(of: ParameterLayout) -> np.ndarray:
        """Per rank, on one of its devices, where every weight of a layer is one."""
        ones = {n: jax.device_put(np.ones(like.shape, np.float32), like.sharding) for n, like in of.canonical().items()}
        found = np.zeros(trainer.mesh.shape["pipe"], int)
        for name, array in flatten(of.stack(ones)).items():
            if name.split(".")[0] in KINDS:
                shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
                found += [int((np.asarray(shards[rank]) == 0).sum()) for rank in range(len(found))]
        return found

    weights, biases = trainer.params_layout, zeros(trainer.bias_layout)
    state = 8 * zeros(weights) + 4 * biases
    working = 8 * zeros(dataclasses.replace(weights, zero=False)) + 4 * biases
    if "schedule" not in layout:
        working += working[::-1]
    worst = int(np.argmax(state + working))
    assert empty_slots(trainer) == (state[worst], working[worst])
    assert state[worst] > 0


def test_the_steps_are_those_of_one_device(runs, whole):
    """Losses, and the loads of every layer in order: empty microbatches change nothing."""
    folder = runs.root / "one"
    with after_step(SMALL_STEPS, kill(signal.SIGTERM)):
        train(laid_out(runs), folder)
    ours, theirs = records(whole.folder, "train")[:SMALL_STEPS], records(folder, "train")
    for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose([x[name] for x in ours], [x[name] for x in theirs], rtol=1e-5, err_msg=name)
    for name in ("load", "max_vio", "learning_rate", "batch_rows"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    assert np.shape(ours[0]["load"]) == (MODEL.num_moe_layers + 1, MODEL.moe.num_experts)


def test_the_samples_are_those_of_the_weights_on_one_device(runs, whole):
    arrays, _ = checkpoint(whole.folder, STEPS)
    tokenizer = Tokenizer.load(whole.folder / "tokenizer.json")
    generator = Generator(bind_canonical(MODEL, {name: jax.numpy.asarray(array) for name, array in arrays.items()}))
    prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT).tolist()]
    (output,) = generator.generate([prompt], max_new_tokens=6, sampling=GREEDY, stop_ids=(tokenizer.eos_id,))
    sample = json.loads((whole.folder / "samples.jsonl").read_text().splitlines()[0])
    assert sample["text"] == tokenizer.decode(output, skip_specials=True)
    assert (whole.folder / "report.html").exists()


def test_a_folder_that_was_exported_from_a_pipeline_run_loads(runs, whole):
    """As one file of weights and as one model: no stage or stack is left in it."""
    out = runs.root / "exported"
    assert convert.main(["to-hf", str(whole.folder), str(out), "--precision", "float32"]) == 0
    loaded = deepseek_jax.load(out, progress=False)
    arrays, _ = checkpoint(whole.folder, STEPS)
    model = bind_canonical(MODEL, {name: jax.numpy.asarray(array) for name, array in arrays.items()})
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_allclose(np.asarray(loaded(tokens)), np.asarray(model(tokens)), atol=1e-5)


# --- from layout to layout ------------------------------------------------------------------------------------------


LAYOUTS = (
    {"pipe": 4, "expert": 2, "schedule": "zb_h1"},
    {"data": 2},
    {"pipe": 2, "data": 2, "schedule": "dualpipe_v"},
    {"pipe": 2, "node": 2, "schedule": "interleaved_one_f_one_b", "zero": False},
)


def test_a_checkpoint_moves_between_layouts_and_schedules_bit_for_bit(runs, whole, tmp_path):
    """Weights, moments and biases: restored, saved and restored again, through every kind of stage map."""
    saved, documents = checkpoint(whole.folder, STEPS)
    store = CheckpointStore(whole.folder / "checkpoints")
    for number, layout in enumerate(LAYOUTS):
        trainer = loop.make_trainer(laid_out(runs, **layout))
        state = canonical.from_canonical(trainer, store.restore(STEPS, canonical.templates(trainer)), STEPS)
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {trainer.mesh.size}
        entries = canonical.to_canonical(trainer, state)
        assert_same_arrays({name: np.asarray(array) for name, array in entries.items()}, saved)
        assert any(array.any() for name, array in saved.items() if name.endswith("router.bias"))
        with CheckpointStore(tmp_path / str(number)) as store:
            store.save(STEPS, entries, documents, wait=True)


@pytest.mark.slow
def test_a_run_moves_between_layouts_and_schedules(runs, whole):
    """Dualpipe, then ZB-H1 in four stages, then no pipeline, then DualPipeV: the losses of the run that stayed."""
    folder = runs.root / "moved"
    parts = ((5, {}), (8, LAYOUTS[0]), (11, LAYOUTS[1]), (14, LAYOUTS[2]))
    for number, (until, layout) in enumerate(parts):
        part = laid_out(runs, **layout) if layout else runs.base
        with after_step(until, kill(signal.SIGTERM)):
            assert train(part, folder, resume=number > 0)[0].step == until
    ours, theirs = records(folder, "train"), records(whole.folder, "train")
    assert [line["step"] for line in ours] == list(range(1, 15))
    assert ours[:5] == theirs[:5]
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs[:14]], rtol=1e-4)


def test_another_run_starts_from_the_weights_of_one_in_a_pipeline(runs, whole):
    """On other stages: what lies on its devices are the very weights of the checkpoint."""
    layout = laid_out(runs, pipe=4, expert=2, schedule="one_f_one_b")
    started = dataclasses.replace(
        layout,
        init_from=str(whole.folder),
        tokenizer=dataclasses.replace(layout.tokenizer, path=str(whole.folder / "tokenizer.json")),
    )
    trainer = loop.make_trainer(started)
    state = first_state(started, trainer)
    expected, _ = checkpoint(whole.folder, STEPS)
    weights = {name: array for name, array in expected.items() if not name.startswith("optimizer.")}
    found = canonical.whole_weights(trainer, state)
    assert_same_arrays({name: np.asarray(array) for name, array in found.items()}, weights)


# --- refusals -------------------------------------------------------------------------------------------------------


OWN = to_text(make_schedule("one_f_one_b", 2, 4))
IN_ORDER = {
    "rank 0: F0.0 F0.1 BW0.0 F0.2 BW0.1 F0.3 BW0.2 BW0.3": "rank 0: F0.0 BW0.0 F0.1 F0.2 BW0.1 F0.3 BW0.2 BW0.3",
    "rank 1: F0.0 BW0.0 F0.1 BW0.1 F0.2 BW0.2 F0.3 BW0.3": "rank 1: F0.0 F0.1 BW0.0 BW0.1 F0.2 BW0.2 F0.3 BW0.3",
}
"""Its ranks, and the same when rank 0 waits for a backward before the forward that rank 1 waits for."""


def exchanged(text: str, changes: dict[str, str]) -> str:
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


FILES = {
    "own.txt": OWN,
    "missing.txt": exchanged(OWN, {"F0.0 F0.1 BW0.0 F0.2 ": "F0.0 F0.1 BW0.0 "}),
    "doubled.txt": exchanged(OWN, {"F0.0 F0.1": "F0.0 F0.1 F0.0"}),
    "deadlock.txt": exchanged(OWN, IN_ORDER),
    "ranks.txt": to_text(make_schedule("one_f_one_b", 4, 4)),
}
BATCH = "schedule.batch_rows.phases.1.value"
REFUSED = [
    # A schedule that cannot be.
    (["pipe=3"], "dualpipe needs an even number of ranks, not 3: use 2 or 4"),
    (["schedule=dualpip"], "there is no schedule 'dualpip'; did you mean dualpipe?"),
    (["chunks=2"], "chunks belong to interleaved_one_f_one_b, not to dualpipe"),
    (["schedule=nowhere.txt"], "there is no schedule file nowhere.txt"),
    (["schedule=missing.txt"], "rank 0: F0.2 (forward of microbatch 2) is in none of its 7 cells"),
    (["schedule=doubled.txt"], "rank 0, cell 2 (F0.0): F0.0 is there twice, first in cell 0"),
    (
        ["schedule=deadlock.txt"],
        "deadlocks: rank 0, cell 1: B0.0 waits for B0.0 of rank 1; rank 1, cell 1: F0.1 waits for F0.1 of rank 0",
    ),
    (["schedule=ranks.txt"], "ranks.txt is for 4 pipeline ranks, parallel.pipe is 2"),
    # Stages that cannot be.
    (["pipe=8", "expert=1", "schedule=gpipe"], "8 stages are more than the model's 4 layers"),
    (
        ["layers_per_stage=2,3"],
        "parallel.layers_per_stage=(2, 3) is for 2 stages with 5 layers; needed are 2 with the model's 4",
    ),
    (
        ["layers_per_stage=1,1,2"],
        "parallel.layers_per_stage=(1, 1, 2) is for 3 stages with 4 layers; needed are 2 with the model's 4",
    ),
    (["data=3"], "the mesh pipe 2 x data 3 x node 1 x expert 2 needs 12 devices, there are 8"),
    # Batches that it cannot have.
    (
        ["pipe=4"],
        "dualpipe over 4 ranks needs at least 8 microbatches (4 each way), not 4; the largest batch is 8 rows over 2 "
        "devices in microbatches of 1: raise schedule.batch_rows to 16 or choose another parallel.schedule",
    ),
    (
        ["microbatch_rows=4", BATCH + "=16"],
        "dualpipe over 2 ranks needs at least 4 microbatches (2 each way), not 2; the largest batch is 16 rows over 2 "
        "devices in microbatches of 4: raise schedule.batch_rows to 32, lower parallel.microbatch_rows to 2 or choose "
        "another parallel.schedule",
    ),
    (["schedule=own.txt", BATCH + "=16"], "own.txt is for 4 microbatches, a batch has 8"),
    (
        ["schedule=own.txt", "evaluation.batch_rows=16"],
        "evaluation.batch_rows=16: parallel.schedule=own.txt is for 4 microbatches, a batch has 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: " ".join(value) if value[1:] else None)
def test_what_cannot_be_a_pipeline_is_refused_in_one_line(runs, tmp_path, monkeypatch, capsys, changes, message):
    """On the command line, before any text is read and any array is made; nothing is left in the folder."""

    def too_late(*arguments, **settings):
        raise AssertionError("the data was read first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "make_tokenizer", too_late)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    save_config(runs.base, tmp_path / "config.json")
    before = sorted(path.name for path in tmp_path.iterdir())
    given = [change if "." in change.partition("=")[0] else f"parallel.{change}" for change in changes]
    assert run.main(["--config=config.json", "--workdir=run", *(f"--set={change}" for change in given)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_vocabulary_that_stages_cannot_share_is_refused(runs):
    odd = dataclasses.replace(runs.base, model=dataclasses.replace(MODEL, vocab_size=301))
    with pytest.raises(ConfigError, match=r"^model.vocab_size=301 does not split evenly over parallel.pipe=2[^\n]*$"):
        loop.make_trainer(odd)


def test_a_trainer_on_a_mesh_without_stages_is_refused(runs):
    """Its layers are placed on two ranks, and the mesh has one, or no axis for them."""
    stages = place(MODEL, stage_map=runs.base.parallel.schedule_choice.stage_map)
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"^a placement on 2 ranks needs a mesh with pipe=2, not pipe=1$"):
        Trainer(Transformer(MODEL), stages, mesh, runs.base.optimizer.make, step_config(runs.base))
    without = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with pytest.raises(ConfigError, match=r"^the mesh has the axes data, a trainer needs pipe, data, node, expert: "):
        Trainer(Transformer(MODEL), stages, without, runs.base.optimizer.make, step_config(runs.base))


def test_a_batch_that_has_not_the_microbatches_is_refused_before_it_runs(runs):
    """One's own loop over a trainer: nothing is padded there."""
    trainer, nothing = loop.make_trainer(runs.base), None
    for rows in (SMALL, 5):
        message = rf"^a batch of {rows} rows does not split over 2 devices .*: pad it to {LARGE} rows .*padded_rows\)$"
        with pytest.raises(ConfigError, match=message):
            trainer.step(nothing, full(MODEL, rows, LENGTH), hyperparameters())
        with pytest.raises(ConfigError, match=message):
            trainer.evaluate(nothing, full(MODEL, rows, LENGTH))


# --- a schedule of one's own ----------------------------------------------------------------------------------------


def test_a_schedule_from_a_file_is_found_again_from_any_folder(runs, tmp_path, monkeypatch):
    """What a run saves of its config has the file's whole path."""
    (tmp_path / "own.txt").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = laid_out(runs, pipe=2, expert=2, schedule="own.txt")
    saved = start.with_absolute_paths(own, CheckpointStore(tmp_path / "checkpoints"))
    assert saved.parallel.schedule == str(tmp_path / "own.txt")
    monkeypatch.chdir(tmp_path.parent)
    trainer = loop.make_trainer(saved)
    assert trainer.padded_rows(SMALL) == LARGE
    assert trainer.schedule.make(4).name == "one_f_one_b"
    assert start.with_absolute_paths(runs.base, CheckpointStore(tmp_path / "checkpoints")) == runs.base
