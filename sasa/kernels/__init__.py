"""Local attention: functions of tensors, and the backends that compute them.

functional.py is the way in; operators.py registers the operators, dispatch.py chooses the backend of a call,
interface.py says what a backend is; reference.py, tiled.py, cpu.py and triton_backend.py are the four.
projected_operator.py is a layer's attention with its projections inside the kernel. stem.py is the attention of the
stem, stem_operator.py its kernels.
"""

from sasa.kernels.dispatch import backends, check_backend, choose_backend
from sasa.kernels.functional import (
    attention_logits,
    local_attention,
    local_attention_packed,
    local_attention_pooled,
    pools,
)
from sasa.kernels.interface import BORDERS

__all__ = [
    "BORDERS",
    "attention_logits",
    "backends",
    "check_backend",
    "choose_backend",
    "local_attention",
    "local_attention_packed",
    "local_attention_pooled",
    "pools",
]
