"""Sparse layers whose forward does not run in the first training step: found, and named in an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from feather_kernels.ops.eager import CallRecord
from feather_kernels.sparsify.selection import Use


class FirstStep:
    """Records, while it lives, with which thresholds the threshold op is called."""

    def __init__(self) -> None:
        self._record = CallRecord()
        self._record.start()
        self._stop = weakref.finalize(self, self._record.stop)

    def check(self, uses: Sequence[Use]) -> None:
        """Raise RuntimeError naming the uses whose threshold no call had; else record no more."""
        unread = [
            use.name
            for use in uses
            if not use.may_be_unused
            and use.latent.numel()
            and use.threshold.threshold.data_ptr() not in self._record.addresses
        ]
        if unread:
            raise RuntimeError(
                f"the forward of {len(unread)} sparse layers has not run in the first training step: "
                f"{', '.join(unread)}. Either the model did not use them: name them in may_be_unused=[...] if it will "
                "later, else in ignore=[...]. Or it reads their weight without calling them, which would train them "
                "dense: name them in read_directly=[...]"
            )
        self._stop()
