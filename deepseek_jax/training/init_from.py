"""What a run starts from when not from nothing: a Hugging Face folder (`hf:FOLDER`), or a run's newest checkpoint.

The weights, router biases and tokenizer are that model's; the optimizer, the data and the schedules begin anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.config_io import diff
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.load import load_state
from deepseek_jax.interop.weights import WeightSource
from deepseek_jax.paths import local_path
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.step import Trainer, TrainState
from deepseek_jax.training.weights import CheckpointWeights, tokenizer_of

HUGGING_FACE = "hf:"


def starting_from(experiment: Experiment, init_from: str) -> Experiment:
    """`experiment` with the architecture and the tokenizer of what it starts from.

    Args:
      experiment: the recipe; of its model only the initial weights' size stays.
      init_from: `hf:` and a Hugging Face folder, or the folder of a run or of its checkpoints.

    Raises:
      InteropError, CheckpointError: the folder does not hold a whole model.
    """
    with open_weights(init_from) as source:
        model = dataclasses.replace(source.model, init_std=experiment.model.init_std)
    folder = _folder(init_from)
    path = tokenizer_of(folder)
    found = None if path is None else str(path.absolute())
    if found is None and experiment.tokenizer.path is None:
        raise ConfigError(
            f"{folder} has no tokenizer.json, and a new tokenizer's tokens would not be those of its weights: "
            "set tokenizer.path"
        )
    tokenizer = dataclasses.replace(experiment.tokenizer, path=found) if found else experiment.tokenizer
    absolute = HUGGING_FACE * init_from.startswith(HUGGING_FACE) + str(folder.absolute())
    return dataclasses.replace(experiment, model=model, tokenizer=tokenizer, init_from=absolute)


def first_state(experiment: Experiment, trainer: Trainer) -> TrainState:
    """The state before the first step: drawn from the seed, or with the weights of `experiment.init_from`."""
    if experiment.init_from is None:
        return trainer.initial_state(experiment.seed if experiment.weights_seed is None else experiment.weights_seed)
    with open_weights(experiment.init_from) as source:
        _check_same(experiment, source.model)
        return trainer.fresh_state(*load_state(source, trainer.params_layout, trainer.bias_layout))


@contextlib.contextmanager
def open_weights(init_from: str) -> Iterator[WeightSource]:
    """The weights that `init_from` names."""
    if not init_from.startswith(HUGGING_FACE):
        folder = _folder(init_from)
        if any(folder.glob("*.safetensors")):
            raise ConfigError(f"{folder} is a Hugging Face folder: start from it with hf:{init_from}")
        yield CheckpointWeights(init_from)
        return
    with HuggingFaceFolder(_folder(init_from)) as source:
        yield source


def _folder(init_from: str) -> Path:
    return Path(local_path(init_from.removeprefix(HUGGING_FACE), "the folder to start from"))


def _check_same(experiment: Experiment, saved: ModelConfig) -> None:
    """Raises `ConfigError` unless the weights fit; how far the context reaches may change, as it does in extension."""

    def comparable(model: ModelConfig) -> ModelConfig:
        return dataclasses.replace(model, init_std=1.0, attention=dataclasses.replace(model.attention, yarn=None))

    if differences := diff(comparable(saved), comparable(experiment.model), "model"):
        path, there, here = differences[0]
        raise ConfigError(
            f"{experiment.init_from} holds another architecture: {path} is {there} there and {here} here; "
            "start with --init_from, which takes the architecture from there, and change nothing of it"
        )
