"""Records the tensors that the GPU backends upload."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from feather_kernels.backends import device_constants
from feather_kernels.backends.gpu import chunk_tables


def count_uploads(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the list that collects every upload from now on; forgets what was uploaded before."""
    patch.setattr(device_constants, "_kept", OrderedDict())
    patch.setattr(chunk_tables, "_moves", OrderedDict())
    uploads, upload = [], device_constants._upload

    def counted(values: torch.Tensor, device: torch.device) -> Any:
        uploads.append(values)
        return upload(values, device)

    patch.setattr(device_constants, "_upload", counted)
    return uploads
