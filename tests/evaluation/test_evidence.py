"""Records of log-weights: joined from parts, cut into rows, merged, and refused where weights are not finite."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import pyro_vae as pv


def fields_of(record):
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def test_parts_join_to_the_record_of_all_data():
    log_w = torch.randn(40, 7, dtype=torch.float64)
    log_w[3, 5] = -math.inf
    whole = pv.LogLikelihood.from_weights(log_w)
    parts = [pv.LogLikelihood.from_weights(part) for part in log_w.split(3, 1)]
    joined = pv.LogLikelihood.joined(iter(parts), 7, log_w.device)
    for record, expected in ((joined, whole), (joined.of(slice(0, 3)), parts[0])):
        for name, value in fields_of(expected).items():
            torch.testing.assert_close(getattr(record, name), value)
    assert joined.zero_weights.tolist() == [0, 0, 0, 0, 0, 1, 0]


def test_rows_of_annealed_weights_are_those_of_the_data():
    record = pv.evaluation.AnnealedLikelihood.from_weights(torch.randn(4, 6), acceptance=torch.rand(9))
    some = record.of(slice(2, 5))
    assert torch.equal(some.log_weights, record.log_weights[:, 2:5])
    assert torch.equal(some.per_datum, record.per_datum[2:5])
    assert torch.equal(some.acceptance, record.acceptance)
    assert some.num_samples == 4


def test_where_takes_each_datum_from_one_of_two():
    first, second = (pv.LogLikelihood.from_weights(torch.randn(30, 3)) for _ in range(2))
    merged = first.where(torch.tensor([True, False, True]), second)
    for name in ("per_datum", "per_datum_error", "ess", "zero_weights", "elbo", "pareto_k"):
        a, b = getattr(first, name), getattr(second, name)
        assert torch.equal(getattr(merged, name), torch.stack([a[0], b[1], a[2]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("record", [pv.Evidence, pv.LogLikelihood])
def test_log_weights_that_are_nan_or_infinite_are_refused(record, bad):
    log_w = torch.zeros(30, 3)
    log_w[2, 1] = bad
    with pytest.raises(FloatingPointError, match="got NaN or plus infinity"):
        record.from_weights(log_w)
