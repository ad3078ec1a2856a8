"""The proof for matrices that train in directions: their change vanishes on all others, to the rounding of the files.

Bits are not the same there, by construction: W0 + B V^T is rounded to the file's data type, and where the start is the rounding
of float32 masters, so is W0. So a change is D = (W - W0)(1 - P), P the projection on the open directions V, and it is held
against what rounding alone can make of it:

    of a row      |D_i| <= |E_i|, E being the largest rounding error of every weight: a projection makes nothing longer
    of a weight   |D_ij| <= 8 sqrt(sum_k E_ik^2 (1 - P)_kj^2), which errors that know nothing of each other exceed with a
                  probability below 1e-13 (Hoeffding's inequality)

Computed in float64 by numpy, and so with none of the operations that made the weights.

Shapes: O and I, outputs and inputs of a matrix; N blocks of its inputs, W their width, R open directions of a block.
"""

from dataclasses import dataclass

import numpy as np

EPSILONS = {"F32": 2.0**-24, "BF16": 2.0**-9, "F16": 2.0**-12, "F64": 2.0**-53}  # half a unit in the last of a 1's places
SMALLEST = {"F32": 2.0**-150, "BF16": 2.0**-134, "F16": 2.0**-25, "F64": 2.0**-1075}  # half of the smallest number
TAIL = 8.0


@dataclass(frozen=True)
class Leak:
    """What of a matrix's change lies in its closed directions.

    Attributes:
        fraction: length of that part over the length of the change.
        num_rows: rows in which it is longer than rounding makes it.
        num_weights: weights of which it is larger than rounding makes it.
    """

    fraction: float
    num_rows: int
    num_weights: int

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains all of it."""
        return not self.num_rows and not self.num_weights


def measure_leak(
    before_OI: np.ndarray, after_OI: np.ndarray, basis_NWR: np.ndarray, before_dtype: str, after_dtype: str
) -> Leak:
    """Compare a matrix with its start.

    Args:
        before_OI, after_OI: float64.
        basis_NWR: the open directions; they need not be orthonormal.
        before_dtype: of the start's file.
        after_dtype: of the checkpoint's file.
    """
    change_OI = after_OI - before_OI
    errors_OI = round_half(after_OI, after_dtype) + round_half(after_OI, "F32")
    if before_dtype != "F32":  # which holds masters as they are
        errors_OI += round_half(before_OI, before_dtype)
    # B V^T is computed in float32, with as many additions as there are open directions.
    moved_O1 = np.linalg.norm(change_OI, axis=1, keepdims=True)
    errors_OI += EPSILONS["F32"] * np.sqrt(basis_NWR.shape[-1]) * moved_O1
    num_blocks, width, _ = basis_NWR.shape
    squares_ON = np.zeros((len(change_OI), num_blocks))
    num_weights = 0
    for block in range(num_blocks):
        own = slice(block * width, (block + 1) * width)
        open_WR, _ = np.linalg.qr(basis_NWR[block])
        closed_WW = np.eye(width) - open_WR @ open_WR.T
        leaked_OW = change_OI[:, own] @ closed_WW
        squares_ON[:, block] = np.square(leaked_OW).sum(1)
        allowed_OW = TAIL * np.sqrt(np.square(errors_OI[:, own]) @ np.square(closed_WW))
        num_weights += int((np.abs(leaked_OW) > allowed_OW).sum())
    num_rows = int((squares_ON.sum(1) > np.square(errors_OI).sum(1)).sum())
    total = np.linalg.norm(change_OI)
    return Leak(float(np.sqrt(squares_ON.sum()) / total) if total else 0.0, num_rows, num_weights)


def round_half(values: np.ndarray, dtype: str) -> np.ndarray:
    """The most by which values of a data type may differ from what was rounded to them."""
    _, exponents = np.frexp(values)  # |value| in [1/2, 1) times 2 to the exponent
    return np.maximum(np.ldexp(EPSILONS[dtype], exponents), SMALLEST[dtype])
