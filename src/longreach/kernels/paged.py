"""Keys and values that lie on the pages of a pool: a kernel that reads pages finds them there; for every other kernel they are gathered first.

Gathering reads what attention needs, writes a copy, and the kernel reads the copy: three times the bytes. Knows pages and columns; no method, and nothing of an
engine.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable

import torch

from longreach.kernels import selftest
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Chosen, Kernel, Spans
from longreach.kernels.tiles import Band

Gathered = tuple[torch.Tensor, torch.Tensor]


class OnPages(KV):
    """So many columns of rows, on pages. `k` and `v` gather them, once.

    pool   [N, G, 2, size, D], contiguous, keys before values.
    table  [R, n] the pages of each row. Column 0 is the token `skip` of the first one.
    """

    pool: torch.Tensor
    table: torch.Tensor
    skip: int
    columns: int
    gather: Callable[[], Gathered]

    def __init__(self, pool: torch.Tensor, table: torch.Tensor, skip: int, columns: int, index: int, gather: Callable[[], Gathered]) -> None:
        """`gather()`: these keys and values [R, G, C, D], finite in every column that nobody sees."""
        self.__dict__.update(pool=pool, table=table, skip=skip, columns=columns, index=index, gather=gather)

    @functools.cached_property
    def _gathered(self) -> Gathered:
        return self.gather()

    @property
    def k(self) -> torch.Tensor:
        return self._gathered[0]

    @property
    def v(self) -> torch.Tensor:
        return self._gathered[1]

    @property
    def rows(self) -> int:
        return self.table.shape[0]

    def of_rows(self, rows: int) -> KV:
        return self if rows == self.rows else super().of_rows(rows)


class PagedKernel:
    """What lies on pages is read there, by one pass over the pages of each row; what does not, and a choice or a bias, is `inner`'s."""

    def __init__(self, inner: Kernel) -> None:
        self.inner, self.name = inner, f"{inner.name}; on pages: triton"

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(kv, OnPages) or isinstance(work, Chosen) or bias is not None:
            return self.inner.attend(q, kv, work, scale, softcap, bias)
        from longreach.kernels import pages_triton

        return pages_triton.attend(q, kv.pool, kv.table, kv.skip, kv.columns, work, scale, softcap)


def reading_pages(inner: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> tuple[Kernel, str]:
    """A kernel that reads pages of heads of this width where there is one that passes the self-test, else `inner`, and what is to be said about it."""
    if device.type != "cuda":
        return inner, f"attention gathers pages: there is no kernel that reads them on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return inner, "attention gathers pages, which takes three times the bytes: Triton, which would read them, is not installed"
    kernel = PagedKernel(inner)
    if (failure := failure_of(kernel, device, dtype, width)) is not None:
        return inner, f"attention gathers pages, which takes three times the bytes: the kernel that reads them fails its self-test here ({failure})"
    return kernel, "attention reads pages where they are"


def failure_of(kernel: PagedKernel, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why a kernel cannot be used; None: it can."""
    try:
        found = difference(kernel, device, dtype, width)
    except Exception as error:  # a compiler that is not there, or does not know the device, raises anything
        return f"{type(error).__name__}: {error}"
    return selftest.verdict(found, dtype)


def difference(kernel: PagedKernel, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest difference to `inner` on gathered pages; infinite where a row is taken for empty that is not, or the other way round."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    worst, size, pages, columns = 0.0, 16, 12, 150
    table = (torch.randperm(2 * pages, generator=generator) + 1).view(2, pages)
    for queries, heads in ((1, 2), (1, 8), (40, 4), (3, 6)):
        q = torch.randn(2, heads, queries, width, generator=generator).to(device, dtype)
        pool = torch.randn(2 * pages + 1, 2, 2, size, width, generator=generator)
        pool[0] = torch.nan
        pool = pool.to(device, dtype)
        kv = OnPages(pool, table.to(device), 5, columns, 0, functools.partial(_gather, pool, table.to(device), 5, columns))
        works: list[Band | Spans] = [Band(100), Band(100, 0, 33), Band(100, 90, 120), Band(2, 5)]
        if queries == 1:
            works += [Spans(starts, stops) for starts, stops in (((0, 0), (150, 150)), ((3, 0), (150, 70)), ((20, 9), (20, 150)))]
        for work, softcap in itertools.product(works, (None, 5.0)):
            how = (q, kv, work, width**-0.5, softcap)
            worst = max(worst, selftest.apart(kernel.attend(*how), kernel.inner.attend(*how)))
    return worst


def _gather(pool: torch.Tensor, table: torch.Tensor, skip: int, columns: int) -> Gathered:
    k, v = (pool[table, :, which].transpose(1, 2).flatten(2, 3).narrow(2, skip, columns) for which in (0, 1))
    return k, v
