"""The table of gradient estimators as code: names, rows, a new row; and an objective's repr."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian

import pyro_vae as pv
from pyro_vae.objectives.gradients import ESTIMATORS, Estimator


class Own(pv.Objective):
    family = "own"

    def __init__(self, power, num_particles=2, gradient="pathwise", **options):
        self.power = power
        super().__init__(num_particles, gradient, **options)

    def reduce(self, log_weights):
        return log_weights.mean(0)


def test_names_without_a_row_are_refused_when_the_class_is_made():
    with pytest.raises(pv.PyroVAEError, match=r"expected Wrong.gradients to name estimators of .*got 'gumbel'"):

        class Wrong(pv.Objective):
            gradients = ("pathwise", "gumbel")


def test_a_tuple_of_names_stays_valid():
    class Few(Own):
        gradients = ("pathwise", "vimco")

    assert Few.gradients == {name: ESTIMATORS[name] for name in ("pathwise", "vimco")}
    assert Few(3.0, gradient="vimco").name == "own, VIMCO"
    with pytest.raises(pv.PyroVAEError, match="expected gradient to be one of pathwise, vimco, got 'stl'"):
        Few(3.0, gradient="stl")


def test_names_mean_the_rows_of_the_parent():
    class Few(pv.RWS):
        gradients = ("pathwise",)

    class Linear(pv.ELBO):
        gradients = ("dreg", "disarm")

    assert Few.gradients == pv.RWS.gradients
    assert Linear.gradients == {name: pv.ELBO.gradients[name] for name in ("dreg", "disarm")}


def best(self, log_weights):
    return log_weights.amax(0)


@pytest.mark.parametrize("base", [pv.ELBO, pv.TVO, pv.RWS, pv.PIWAE], ids=lambda base: base.__name__)
@pytest.mark.parametrize("method", ["reduce", "reduce_for_guide"])
def test_another_reduction_keeps_the_rows_that_serve_any(base, method):
    """The ELBO's "dreg" and "disarm" and TVO's "covariance" serve one bound; the row of RWS serves any."""

    class Child(base):
        pass

    changed = type("Changed", (Child,), {method: best})
    assert Child.gradients == base.gradients
    assert changed.gradients == (pv.RWS.gradients if base is pv.RWS else ESTIMATORS)
    assert changed.curvature is pv.Objective.curvature
    few = type("Few", (base,), {method: best, "gradients": ("pathwise",)})
    assert few.gradients == {"pathwise": base.gradients["pathwise"]}
    if base is not pv.RWS:
        with pytest.raises(pv.PyroVAEError, match=r"expected Wrong.gradients to name.*got 'covariance'"):
            type("Wrong", (base,), {method: best, "gradients": ("covariance",)})


def test_a_mixin_s_reduction_and_rows_count_as_the_class_s_own():
    class Best:
        reduce = best

    class Few:
        gradients = ("pathwise", "vimco")

    class Mixed(Few, Best, pv.ELBO):
        pass

    class Quick(Mixed):
        def curvature(self, log_weights):
            return torch.zeros_like(log_weights)

    assert Mixed.gradients == Quick.gradients == {name: ESTIMATORS[name] for name in ("pathwise", "vimco")}
    assert Mixed.curvature is pv.Objective.curvature
    assert Quick.curvature is not pv.Objective.curvature
    assert type("Linear", (Few, pv.ELBO), {}).curvature is pv.ELBO.curvature


def test_a_row_of_one_bound_alone_is_not_inherited_by_another():
    class Mine(Own):
        gradients = Own.gradients | {"mine": replace(ESTIMATORS["score"], any_bound=False)}

    assert "mine" in type("Child", (Mine,), {}).gradients
    assert type("Other", (Mine,), {"reduce": best}).gradients == ESTIMATORS


@pytest.mark.parametrize("objective", [pv.IWAE(2, "vimco"), pv.RWS(3), pv.ELBO(2, "monte_carlo", "disarm")], ids=repr)
def test_objectives_can_be_pickled(objective):
    program = LinearGaussian(2, 1, 3)
    with torch.no_grad():
        objective.bound(lambda x: program.model(x), program.guide, program.x)  # a program that can't be pickled
    assert repr(pickle.loads(pickle.dumps(objective))) == repr(objective)
    assert copy.copy(objective)._known.kinds  # a copy finds no nesting anew


@pytest.mark.parametrize("changes", [{"score": False}, {"curvature": True}, {"path": "all"}])
def test_rows_that_would_be_biased_are_refused(changes):
    with pytest.raises(pv.PyroVAEError, match="expected an estimator of reparameterised sites"):
        replace(ESTIMATORS["vimco"], **changes)


def test_a_guide_without_parts_is_still_the_guide():
    """An empty ModuleDict is false; the prior must not stand in for it."""
    program = LinearGaussian(2, 1, 3)

    class Guide(torch.nn.ModuleDict):
        def forward(self, x):
            program.guide(x)

    log_w = pv.log_weights(program.model, Guide(), program.x, num_particles=3)
    torch.testing.assert_close(log_w, program.log_evidence().expand(3, 3))


def test_a_new_estimator_is_one_row():
    """REINFORCE without a baseline: the factor on the score is R minus c."""

    def signal(objective, log_weights, c):
        return objective.reduce(log_weights).expand_as(log_weights) - c

    class Reinforced(Own):
        gradients = Own.gradients | {"reinforce": Estimator(", REINFORCE", "some", signal=signal)}

    program = LinearGaussian(2, 1, 3)
    objective = Reinforced(3.0, gradient="reinforce")
    assert objective.name == "own, REINFORCE"
    program.A.requires_grad_()
    objective.differentiable_loss(program.model, program.guide, program.x).backward()
    assert program.A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("objective", "shown"),
    [
        (pv.ELBO(), "ELBO(num_particles=1, kl='analytic')"),
        (pv.ELBO(4, "monte_carlo", "stl"), "ELBO(num_particles=4, kl='monte_carlo', gradient='stl')"),
        (pv.ELBO(beta=0.5, free_bits=0.1), "ELBO(num_particles=1, kl='analytic', beta=0.5, free_bits=0.1)"),
        (pv.IWAE(16, "dreg", chunk_size=4), "IWAE(num_particles=16, gradient='dreg', chunk_size=4)"),
        (pv.Renyi(0.5, 8), "Renyi(alpha=0.5, num_particles=8)"),
        (pv.MIWAE(2, 3), "MIWAE(num_outer=2, num_particles=3)"),
        (pv.RWS(4, 0.5), "RWS(num_particles=4, sleep=0.5)"),
        (pv.TVO(4, (0, 0.5, 1)), "TVO(num_particles=4, partitions=(0.0, 0.5, 1.0))"),
        (Own(3.0), "Own(power=3.0, num_particles=2)"),
        (Own(3.0, 5, vectorize_particles=False), "Own(power=3.0, num_particles=5, vectorize_particles=False)"),
    ],
)
def test_the_repr_shows_the_arguments(objective, shown):
    assert repr(objective) == shown


def test_values_outside_the_support_are_a_refusal_of_this_package():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z, validate_args=True), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(pv.PyroVAEError, match=r"(?s)log_prob at site 'x'.*expected values in the support"):
        pv.ELBO().loss(model, guide, torch.tensor([0.5, 1.0]))
