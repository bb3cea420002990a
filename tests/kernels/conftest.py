"""Kernel tests run on the GPU where there is one, and otherwise in Triton's interpreter, with bf16 mended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from kernel_cases import SHAPES, Case, make_case

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.mend()


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """The interpreter computes both sides of a select, so a guarded log2(0) or 1/0 warns there and only
    there."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    return make_case(**request.param, device=device)


@pytest.fixture
def new_case(device: torch.device) -> Callable[..., Case]:
    return partial(make_case, device=device)
