"""What each of two processes does for `test_hosts.py`: runs that stop, go on and come to the end of their data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import jax
from tiny_run import after_step, experiment, kill, quick_runs, train

from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.training import loop
from deepseek_jax.training.experiment import CheckpointConfig, Experiment, MovingAverageConfig

STOPPED_AT = 5


def pair(texts: Path) -> Experiment:
    """A run of two processes with a device each: its batch ramps from 2 to 4 rows, and is even throughout."""
    base = experiment(
        texts,
        parallel=ParallelConfig(data=2, microbatch_rows=1),
        checkpoint=CheckpointConfig(),
        moving_average=MovingAverageConfig(decay=0.9),
    )
    schedule = dataclasses.replace(base.schedule, batch_multiple=2, total_tokens=base.schedule.total_tokens // 2)
    return dataclasses.replace(base, schedule=schedule)


def one_epoch(texts: Path) -> Experiment:
    """A run that would go on for longer than its data."""
    base = pair(texts)
    schedule = dataclasses.replace(base.schedule, total_tokens=10**6)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, epochs=1), schedule=schedule)


def main(folder: Path, port: str, rank: int) -> None:
    """Trains with the other process; writes how each run ended to `ended.{rank}.json`."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    run, epoch = pair(folder / "texts"), one_epoch(folder / "texts")
    with quick_runs() as patch:
        with after_step(STOPPED_AT, kill(signal.SIGTERM) if rank == 1 else lambda state: None):
            stopped, _ = train(run, folder / "run")
        if rank == 0:
            shutil.copytree(folder / "run", folder / "copy")
        hosts.gather(None)  # the copy is of the stopped run
        ended, _ = train(run, folder / "run", resume=True)
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        spent, _ = train(epoch, folder / "epoch")
        again, _ = train(epoch, folder / "epoch", resume=True)
    results = {"stopped": stopped, "ended": ended, "spent": spent, "again": again}
    text = json.dumps({name: dataclasses.asdict(result) for name, result in results.items()})
    (folder / f"ended.{rank}.json").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
