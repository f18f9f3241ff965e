from deepseek_jax.parallel.pipeline.executor import Pipeline, pipeline
from deepseek_jax.parallel.pipeline.generators import make_schedule, one_rank
from deepseek_jax.parallel.pipeline.protocol import LossScales, StagedModel
from deepseek_jax.parallel.pipeline.schedule import Schedule

__all__ = ["LossScales", "Pipeline", "Schedule", "StagedModel", "make_schedule", "one_rank", "pipeline"]
