"""Sparse layers whose forward does not run in the first training step: found, and named in an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from feather_kernels.ops.call_record import CallRecord
from feather_kernels.sparsify.selection import Use


class FirstStep:
    """Records, while it lives, with which thresholds the threshold op is called."""

    def __init__(self) -> None:
        self._record = CallRecord()
        self._record.start()
        self._stop = weakref.finalize(self, self._record.stop)

    def check(self, uses: Sequence[Use], forward_ran: bool) -> bool:
        """Whether the check is done; it waits while no layer at all has run and ``forward_ran`` says no model has.

        Raises:
            RuntimeError: some layers have not run; it names them.
        """
        if not self._record.addresses and not forward_ran:
            return False
        unread = [
            use
            for use in uses
            if not use.may_be_unused
            and use.latent.numel()
            and use.binding.value.data_ptr() not in self._record.addresses
        ]
        if unread:
            raise RuntimeError(
                f"the forward of {len(unread)} sparse layers has not run in the first training step: "
                f"{', '.join(_describe(use) for use in unread)}. Either the model did not use them: name them in "
                "may_be_unused=[...] if it will later, else in ignore=[...]. Or it reads their weight without calling "
                "them, which would train them dense: name them in read_directly=[...]"
            )
        self._stop()
        return True


def _describe(use: Use) -> str:
    """The name, and the function that stands in the place of the layer's forward, if there is one."""
    wrapper = use.module.__dict__.get("forward")
    if wrapper is None:
        return use.name
    return f"{use.name} (whose forward is {getattr(wrapper, '__qualname__', repr(wrapper))})"
