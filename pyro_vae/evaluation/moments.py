"""Moments of values that come in parts, without the values."""

import math

import torch
from torch import Tensor


class Moments:
    """The number of rows, (N, D), their mean, and the sums of the powers 2 to 4 of what is left without it, each (D,).

    References:
        Pébay (2008), *Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
        Moments*.
    """

    def __init__(self) -> None:
        self.number, self.mean, self.powers = 0, torch.zeros(()), torch.zeros(3, 1)

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Those of rows (n, D)."""
        found = cls()
        found.number, found.mean = len(values), values.mean(0)
        found.powers = torch.stack([(values - found.mean).pow(k).sum(0) for k in (2, 3, 4)])
        return found

    def add(self, values: Tensor) -> None:
        """Add rows (n, D)."""
        self.merge(Moments.of(values))

    def merge(self, other: "Moments") -> None:
        """Add the rows of others."""
        number, mean, (second, third, fourth) = other.number, other.mean, other.powers
        if not self.number:
            self.number, self.mean, self.powers = number, mean, other.powers
            return
        a, b, (second_a, third_a, fourth_a) = self.number, number, self.powers
        total, apart = a + b, mean - self.mean
        self.number, self.mean = total, self.mean + apart * b / total
        self.powers = torch.stack(
            [
                second_a + second + apart**2 * a * b / total,
                third_a
                + third
                + apart**3 * a * b * (a - b) / total**2
                + 3 * apart * (a * second - b * second_a) / total,
                fourth_a
                + fourth
                + apart**4 * a * b * (a * a - a * b + b * b) / total**3
                + 6 * apart**2 * (a * a * second + b * b * second_a) / total**2
                + 4 * apart * (a * third - b * third_a) / total,
            ]
        )

    @property
    def variance(self) -> Tensor:
        """The variance over rows."""
        return self.powers[0] / (self.number - 1)

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the mean."""
        return (self.variance / self.number).sqrt()

    @property
    def variance_error(self) -> Tensor:
        """The standard error of the variance, which is that of the mean of the squares."""
        squares = (self.powers[2] - self.powers[0].square() / self.number).clamp(min=0) / (self.number - 1)
        return squares.sqrt() / math.sqrt(self.number)
