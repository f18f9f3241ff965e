from pallas_kernels.permute.api import combine_rows, gather_rows
from pallas_kernels.permute.tables import check_inverse, inverse_of_slots

__all__ = ["check_inverse", "combine_rows", "gather_rows", "inverse_of_slots"]
