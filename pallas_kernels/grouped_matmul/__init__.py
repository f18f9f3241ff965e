from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from pallas_kernels.grouped_matmul.groups import check_group_sizes, group_starts, preferred_alignment

__all__ = [
    "check_group_sizes",
    "group_starts",
    "grouped_matmul",
    "grouped_matmul_dw",
    "grouped_matmul_dx",
    "preferred_alignment",
]
