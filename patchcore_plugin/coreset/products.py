"""Matrix products on this machine: which type is faster, and float32 products that stay float32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch

RESULT_ERROR = 0.53
"""Error of a product's result, relative to the machine epsilon of its type: rounding, and room for sums in float32."""

_PRODUCT_ROWS, _PRODUCT_COLUMNS, _CHECKED_ROWS = 2048, 512, 128


@lru_cache
def faster_dtype(device: torch.device, columns: int, threads: int) -> torch.dtype:
    """bfloat16 or float32: the type in which products of rows with ``columns`` values are faster here.

    bfloat16 products must be summed in float32, as the sampler's error bound assumes. Not every library does so everywhere:
    a CPU's are checked.

    Args:
        device: Device of the products.
        columns: Values of a row.
        threads: torch's number of threads, which changes the answer.
    """
    del threads  # part of the cache's key
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    rows = torch.randn((_PRODUCT_ROWS, columns), generator=torch.Generator().manual_seed(0))
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = rows.to(dtype), rows[:_PRODUCT_COLUMNS].to(dtype).T.contiguous().T
        product, seconds[dtype] = _timed_product(left, right)
        if not _is_summed_in_float32(left[:_CHECKED_ROWS], right, product[:_CHECKED_ROWS]):
            del seconds[dtype]
    return min(seconds, key=seconds.get, default=torch.float32)


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, float]:
    """``left @ right.T`` and the seconds that it takes."""
    product = left @ right.T
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(left, right.T, out=product)
        seconds.append(time.perf_counter() - started)
    return product, min(seconds)


def _is_summed_in_float32(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> bool:
    truth = left.double() @ right.double().T
    error = (product.double() - truth).abs()
    bound = truth.abs() * torch.finfo(product.dtype).eps * RESULT_ERROR + left.shape[1] * 2.0**-18
    return not bool((error > bound).any())


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute float32 products in float32 within this context, whatever precision the user allows torch.

    The sampler's error bound does not hold for float32 products that are computed in bfloat16 or TF32.
    """
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9 and later
        settings = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.mkldnn.matmul, "fp32_precision")]
        before = [getattr(*setting) for setting in settings]
        for setting in settings:
            setattr(*setting, "ieee")
        restore = [partial(setattr, *setting, value) for setting, value in zip(settings, before, strict=True)]
    else:
        restore = [partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())]
        torch.set_float32_matmul_precision("highest")
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    restore.append(partial(setattr, torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", reduced))
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for action in restore:
            action()
