"""An array in a file, in place of HDF5's, which is no dependency."""

from __future__ import annotations

import numpy as np


class OnDisk:
    """It takes slices and increasing numbers alone, as HDF5 does, and counts the rows that it gives."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.most = self.given = 0  # at a time, and in all

    def __getitem__(self, index):
        if not isinstance(index, slice) and not (np.diff(index) > 0).all():
            raise TypeError("Indexing elements must be in increasing order")
        found = self.values[index]
        self.most, self.given = max(self.most, len(found)), self.given + len(found)
        return found
