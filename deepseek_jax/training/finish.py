"""What a run does when its tokens are spent: judge itself on held-out text, speak, and write the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib import metadata

import jax
from etils import epath
from jax.sharding import NamedSharding

from deepseek_jax.data import Tokenizer, heldout_documents
from deepseek_jax.evaluation.compression import compression_baselines
from deepseek_jax.evaluation.heldout import HeldoutResult, bits_per_byte
from deepseek_jax.evaluation.report import write_report
from deepseek_jax.inference.generate import Generator, Sampling, bind_canonical
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.paths import write_aside
from deepseek_jax.training import canonical
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.moving_average import MovingAverage
from deepseek_jax.training.step import Trainer, TrainState

GREEDY = Sampling()
WARM = Sampling(temperature=0.8, top_p=0.95, seed=0)


class HeldoutEvaluator:
    """Bits per byte on a run's held-out documents; called with a state, as often as wanted."""

    def __init__(self, experiment: Experiment, trainer: Trainer, tokenizer: Tokenizer):
        self._experiment, self._trainer, self._tokenizer = experiment, trainer, tokenizer
        self.documents = heldout_documents(experiment.data)
        self._some_documents = _some(self.documents, experiment.evaluation.max_bytes)

    def __call__(self, state: TrainState, *, complete: bool) -> HeldoutResult | None:
        """The result over all held-out text, or about `evaluation.max_bytes` of it; None if nothing is held out."""
        documents = self.documents if complete else self._some_documents
        if not documents:
            return None
        rows = self._trainer.padded_rows(self._experiment.evaluation.batch_rows)
        sharding = NamedSharding(self._trainer.mesh, BATCH_SPEC)

        def evaluate(batch: Microbatch):
            placed = jax.tree.map(
                lambda array: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), batch
            )
            return self._trainer.evaluate(state, placed)

        data = self._experiment.data
        return bits_per_byte(
            evaluate,
            self._tokenizer,
            documents,
            sequence_length=data.sequence_length,
            rows=rows,
            add_bos=data.add_bos,
        )

    def of_average(self, average: MovingAverage | None, state: TrainState, *, complete: bool) -> HeldoutResult | None:
        """The same of the moving average of the weights that led to `state`; None if the run keeps none."""
        return None if average is None else self(average.in_place_of(state), complete=complete)


def finish_run(
    experiment: Experiment,
    trainer: Trainer,
    state: TrainState,
    tokenizer: Tokenizer,
    evaluator: HeldoutEvaluator,
    folder: epath.Path,
    *,
    step: int,
    tokens: int,
    seconds: float,
    heldout: float | None,
    log: Callable[[str], None],
    average: MovingAverage | None = None,
    heldout_average: float | None = None,
) -> float | None:
    """Writes result.json, samples.jsonl and report.html; returns the held-out bits per byte.

    Where `heldout`, those of the weights, are None, they are measured, and `heldout_average`, those of their moving
    average, as well.
    """
    if heldout is None and (judged := evaluator(state, complete=True)) is not None:
        heldout = judged.bits_per_byte
        judged = evaluator.of_average(average, state, complete=True)
        heldout_average = None if judged is None else judged.bits_per_byte
    weights = canonical.whole_weights(trainer, state) if experiment.evaluation.samples else None
    if jax.process_index() != 0:
        return heldout
    baselines = None
    if evaluator.documents:
        baselines = compression_baselines([(d.id, d.text.encode()) for d in evaluator.documents])
    result = {
        "heldout_bits_per_byte": heldout,
        "heldout_average_bits_per_byte": heldout_average,
        "gzip": baselines and {"concatenated": baselines.gzip_concatenated, "per_file": baselines.gzip_per_file},
        "xz": baselines and {"concatenated": baselines.xz_concatenated, "per_file": baselines.xz_per_file},
        "step": step,
        "tokens": tokens,
        "wall_seconds": round(seconds, 1),
        "parameters": canonical.parameter_count(trainer),
        "machine": {
            "platform": platform.platform(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "flax", "optax", "grain", "orbax-checkpoint")},
        },
    }
    write_aside(folder / "result.json", json.dumps(result, indent=1) + "\n")
    # What was measured is kept whatever becomes of the samples.
    samples = [] if weights is None else _samples(experiment, weights, tokenizer, step)
    write_aside(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    report = write_report(folder)
    _say(log, result, samples, report)
    return heldout


def _samples(experiment: Experiment, weights: dict[str, jax.Array], tokenizer: Tokenizer, step: int) -> list[dict]:
    """Continuations of the recipe's prompts, greedy and sampled: this process speaks alone, on one device."""
    prompts = experiment.evaluation.samples
    generator = Generator(bind_canonical(experiment.model, weights))
    begin = [tokenizer.bos_id] if experiment.data.add_bos and tokenizer.bos_id is not None else []
    encoded = [[*begin, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    # Without bos, what comes before a document is the end of another: there an empty prompt begins.
    encoded = [tokens or [tokenizer.eos_id] for tokens in encoded]
    samples = []
    for method, sampling in (("greedy", GREEDY), ("temperature 0.8, top-p 0.95", WARM)):
        outputs = generator.generate(
            encoded,
            max_new_tokens=experiment.evaluation.sample_tokens,
            sampling=sampling,
            stop_ids=(tokenizer.eos_id,),
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            text = tokenizer.decode(output, skip_specials=True)
            samples.append({"step": step, "prompt": prompt, "text": text, "method": method})
    return samples


def _say(log: Callable[[str], None], result: dict, samples: list[dict], report: epath.Path) -> None:
    for sample in samples:
        log(f"\n--- {sample['method']} ---\n{sample['prompt']}⟩{sample['text']}")
    log("")
    if result["heldout_bits_per_byte"] is not None:
        log(f"held-out bits per byte  {result['heldout_bits_per_byte']:.4f}   (lower is better)")
        if result["heldout_average_bits_per_byte"] is not None:
            log(f"of the moving average   {result['heldout_average_bits_per_byte']:.4f}")
        for name in ("gzip", "xz"):
            sizes = result[name]
            log(f"{name:<22}  {sizes['concatenated']:.4f}   ({sizes['per_file']:.4f} file by file)")
    log(f"report                  {report}")


def _some(documents: list, max_bytes: int | None) -> list:
    """Documents, evenly spread over the list, of about `max_bytes` in all."""
    if max_bytes is None:
        return documents
    total = sum(len(document.text.encode()) for document in documents)
    stride = max(round(total / max_bytes), 1)
    return documents[::stride]
