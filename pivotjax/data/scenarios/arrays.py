"""Arrays as .npy files, where a full disk is an error."""

from pathlib import Path

import numpy as np


def save(path: Path, values: np.ndarray) -> None:
    """What `np.save` writes. That hands the values to C's buffered output, whose late errors it does not see: on a full
    disk the file would be short and nobody told. OSError here."""
    values = np.ascontiguousarray(values)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data)
