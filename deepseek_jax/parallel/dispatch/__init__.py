"""Expert dispatch: tokens to the experts they chose, and the experts' outputs back."""

from deepseek_jax.parallel.dispatch.capacity import (
    DispatcherName,
    ExpertMesh,
    check_experts,
    choose_dispatcher,
    dispatchers,
)
from deepseek_jax.parallel.dispatch.exchange import ExchangeDispatcher
from deepseek_jax.parallel.dispatch.hop import Hop
from deepseek_jax.parallel.dispatch.interface import NO_EXPERT, Dispatched, Dispatcher, Traffic
from deepseek_jax.parallel.dispatch.local import LocalDispatcher
from deepseek_jax.parallel.dispatch.ragged import RaggedHop

__all__ = [
    "NO_EXPERT",
    "Dispatched",
    "Dispatcher",
    "DispatcherName",
    "ExchangeDispatcher",
    "ExpertMesh",
    "Hop",
    "LocalDispatcher",
    "RaggedHop",
    "Traffic",
    "check_experts",
    "choose_dispatcher",
    "dispatchers",
]
