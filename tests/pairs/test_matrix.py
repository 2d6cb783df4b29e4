"""Each pair on each kind of data with each objective: a step moves every parameter, or is refused as documented."""

from __future__ import annotations

import pyro
import pytest
from helpers.matrix import CHECKS, NO_TRACE, OBJECTIVES, rows, take_step

ROWS = [
    pytest.param(row, id=f"{row.name}, {row.kind}", marks=[pytest.mark.slow] * (not row.common or row.kind != "binary"))
    for row in rows()
]
pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k-hat")


@pytest.mark.parametrize("row", ROWS)
def test_a_step_with_each_objective_moves_every_parameter(row):
    pyro.set_rng_seed(0)
    for objective in OBJECTIVES:
        refusal = row.refusal(objective)
        if refusal:
            with pytest.raises(ValueError, match=refusal):
                take_step(row, objective)
        else:
            assert take_step(row, objective) == [], objective


def _rarely(row, check):
    compiled = row.kind == "binary" and row.name in ("VAE", "VAE, missing pixels", "HierarchicalVAE, ladder")
    return not row.common or (check == "compiled" and not compiled)


@pytest.mark.parametrize(
    ("row", "check"),
    [
        pytest.param(row, check, id=f"{row.name}, {row.kind}-{check}", marks=[pytest.mark.slow] * _rarely(row, check))
        for row in rows()
        for check in CHECKS
    ],
)
def test_other_uses_of_a_pair(row, check, without_inductor):
    pyro.set_rng_seed(0)
    if check == "compiled" and row.traced:
        with pytest.raises(ValueError, match=NO_TRACE):
            CHECKS[check](row)
    else:
        CHECKS[check](row)
