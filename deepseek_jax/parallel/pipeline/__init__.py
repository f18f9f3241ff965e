from deepseek_jax.parallel.pipeline.executor import Pipeline, pipeline
from deepseek_jax.parallel.pipeline.protocol import LossScales, StagedModel
from deepseek_jax.parallel.pipeline.schedule import Schedule

__all__ = ["LossScales", "Pipeline", "Schedule", "StagedModel", "pipeline"]
