"""An estimate with its standard error: the form in which every evaluation returns a number."""

import math
from dataclasses import dataclass
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.checks import checked, shown
from pyro_vae.devices import wide
from pyro_vae.errors import PyroVAEError
from pyro_vae.printed import Printed


@checked
@dataclass(frozen=True, repr=False)
class Estimate(Printed):
    r"""An estimate with its standard error.

    Attributes:
        value: the estimate, in nats unless stated otherwise.
        standard_error: the estimate's standard error, in the same unit.

    Example:
        >>> import torch, pyro_vae as pv
        >>> print(pv.Estimate.of(torch.tensor([-1.0, -2.0, -3.0])))
        -2.00 ± 0.58
    """

    value: float
    standard_error: float

    @classmethod
    @checked
    def of(cls, values: Tensor) -> Self:
        r"""The mean of independent values (N,), with the standard error :math:`\operatorname{std} / \sqrt N`.

        The standard error of a single value is NaN.

        Raises:
            ValueError: `values` is not a vector, or is empty.
        """
        if values.dim() != 1 or not len(values) or values.is_complex():
            raise PyroVAEError(f"expected a vector of real values, got {shown(values)}. Pass one value for each datum.")
        values = wide(values)
        spread = values.std().item() if len(values) > 1 else math.nan
        return cls(values.mean().item(), spread / math.sqrt(len(values)))

    @checked
    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The normal confidence interval. At level 0.95 it is the value plus and minus 1.96 standard errors."""
        if not 0 < level < 1:
            raise PyroVAEError(f"expected a level between 0 and 1, got {level!r}. For 95%, pass 0.95.")
        reach = dist.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
        return self.value - reach * self.standard_error, self.value + reach * self.standard_error

    def _statement(self) -> str:
        if math.isnan(self.standard_error):
            reason = "of a single value" if math.isfinite(self.value) else "of values that are not finite"
            return f"{self.value:.2f} ({reason}, without an error)"
        # Two decimals, or up to four where a small standard error needs them.
        tiny = not 0 < self.standard_error < 0.095
        digits = 2 if tiny else min(4, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:.{digits}f} ± {self.standard_error:.{digits}f}"

    def _rows(self) -> dict[str, object]:
        rows: dict[str, object] = {"estimate": self}
        if not math.isnan(self.standard_error):
            low, high = (Estimate(end, self.standard_error)._statement().split(" ± ")[0] for end in self.interval())
            rows["95% interval"] = f"{low} to {high}"
        return rows
