"""Whether the values of tensors are finite, and which of them are not zero. By bit patterns, in numpy."""

from __future__ import annotations

from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from adapterbay.registry.admission.safetensors_file import TensorInfo
from adapterbay.registry.errors import Rejected

# dtype: (unsigned integer of the same width, bits of the exponent, bits without the sign)
_LAYOUTS: Final[dict[str, tuple[type[np.unsignedinteger[Any]], int, int]]] = {
    "F16": (np.uint16, 0x7C00, 0x7FFF),
    "BF16": (np.uint16, 0x7F80, 0x7FFF),
    "F32": (np.uint32, 0x7F80_0000, 0x7FFF_FFFF),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
}

FLOAT_DTYPES: Final = frozenset(_LAYOUTS)


def nonzero_mask(file: BinaryIO, tensor: TensorInfo, what: str) -> npt.NDArray[np.bool_]:
    """A boolean array of the tensor's shape: where a value is neither 0 nor -0.

    Raises Rejected with reason NOT_FINITE if any value is NaN or infinite, TRUNCATED if bytes are missing.
    """
    integer, exponent, magnitude = _LAYOUTS[tensor.dtype]
    file.seek(tensor.begin)
    data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise Rejected(f"{what} ends inside the tensor {tensor.name}.", reason="TRUNCATED")
    bits = np.frombuffer(data, dtype=np.dtype(integer).newbyteorder("<"))
    # An exponent of all ones is NaN or infinity in every IEEE 754 format and in bfloat16.
    wrong = (bits & integer(exponent)) == integer(exponent)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise Rejected(
            f"{what} was refused: the tensor {tensor.name} holds NaN or infinity "
            f"({int(np.count_nonzero(wrong))} of {bits.size} values, the first at {place}).",
            reason="NOT_FINITE",
            metadata={"tensor": tensor.name},
        )
    nonzero: npt.NDArray[np.bool_] = (bits & integer(magnitude)) != 0
    return nonzero.reshape(tensor.shape)
