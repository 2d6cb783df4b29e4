"""Pyro's published examples, as they are: each trains with every objective that applies; others say why not."""

from __future__ import annotations

import pyro
import pytest
import torch
from helpers.pyro_examples import CVAE, DMM, PIXELS, SSVAE, VAE, images, quadrants, sequences
from helpers.quick import slow_but
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate

import pyro_vae as pv

X, Y = images()
FLAT = X.reshape(-1, PIXELS)

PROGRAMS = {
    "vae": (VAE, (X,)),
    "cvae": (CVAE, quadrants()),
    "ss-vae, labels": (SSVAE, (FLAT, Y)),
    "ss-vae, no labels": (SSVAE, (FLAT,)),
    "dmm": (DMM, sequences()),
    "dmm, flows": (lambda: DMM(num_iafs=1), sequences()),
}

REPARAMETERISED = {
    "ELBO closed form": lambda **options: pv.ELBO(4, **options),
    "ELBO pathwise": lambda **options: pv.ELBO(4, "monte_carlo", **options),
    "ELBO stl": lambda **options: pv.ELBO(4, gradient="stl", **options),
    "IWAE pathwise": lambda **options: pv.IWAE(4, **options),
    "IWAE stl": lambda **options: pv.IWAE(4, "stl", **options),
    "IWAE dreg": lambda **options: pv.IWAE(4, "dreg", **options),
    "Renyi dreg": lambda **options: pv.Renyi(0.5, 4, "dreg", **options),
    "MIWAE": lambda **options: pv.MIWAE(2, 2, **options),
    "PIWAE": lambda **options: pv.PIWAE(2, 2, **options),
    "CIWAE": lambda **options: pv.CIWAE(0.5, 4, **options),
    "TVO pathwise": lambda **options: pv.TVO(4, **options),
    "JVI": lambda **options: pv.JVI(4, **options),
}
ANY_GUIDE = {
    "ELBO score": lambda **options: pv.ELBO(4, "monte_carlo", "score", **options),
    "ELBO vimco": lambda **options: pv.ELBO(4, "monte_carlo", "vimco", **options),
    "IWAE score": lambda **options: pv.IWAE(4, "score", **options),
    "IWAE vimco": lambda **options: pv.IWAE(4, "vimco", **options),
    "TVO covariance": lambda **options: pv.TVO(4, gradient="covariance", **options),
    "RWS": lambda **options: pv.RWS(4, **options),
}
OBJECTIVES = REPARAMETERISED | ANY_GUIDE
SCALE_PER_SITE = ("ELBO closed form", "ELBO pathwise", "ELBO stl")

FLOWS = ("ELBO pathwise", "ELBO stl", "IWAE pathwise", "IWAE dreg", "IWAE vimco", "RWS")  # the rest is as without them
APPLY = {"ss-vae, no labels": tuple(ANY_GUIDE), "dmm, flows": FLOWS}
CASES = [(program, name) for program in PROGRAMS for name in APPLY.get(program, tuple(OBJECTIVES))]

UNUSED = {"cvae": "baseline_net.", "ss-vae, labels": "encoder_y."}  # the parameters that have no part in the bound


def prepared(case: str):
    """A fresh program, what it is called with, and the options that objectives need for it."""
    make, args = PROGRAMS[case]
    return make(), args, {"vectorize_particles": False} if case == "cvae" else {}


def seeded(function, *args):
    pyro.set_rng_seed(1)
    return function(*args)


# Objectives that differ from IWAE by a reduction alone, and the longest program with others than these, are slow.
QUICK = [(case, name) for case, name in CASES if name.split()[0] not in ("MIWAE", "CIWAE", "JVI", "Renyi", "TVO")]
QUICK = [
    (case, name)
    for case, name in QUICK
    if "dmm" not in case or name in ("ELBO closed form", "IWAE dreg", "IWAE vimco", "RWS")
]


@pytest.mark.parametrize(("case", "name"), slow_but(QUICK, CASES), ids=str)
def test_every_objective_trains_it(case, name):
    program, args, options = prepared(case)
    objective, fixed = OBJECTIVES[name](**options), pv.IWAE(8, **options)
    gradients = {parameter: [] for parameter, _ in program.named_parameters()}
    for parameter, value in program.named_parameters():
        value.register_hook(gradients[parameter].append)
    # What bounds nothing can be raised without limit by a guide that spreads, so JVI goes in small steps.
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 2e-3 if name == "JVI" else 2e-2}), loss=objective)

    before = seeded(fixed.loss, program.model, program.guide, *args)
    losses = [svi.step(*args) for _ in range(14)]
    after = seeded(fixed.loss, program.model, program.guide, *args)

    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-4:]) < sum(losses[:4])
    assert after < before - 3
    for parameter, values in gradients.items():
        assert all(value.isfinite().all() for value in values), parameter
        used = not parameter.startswith(UNUSED.get(case, "none"))
        assert any(value.any() for value in values) == used, parameter


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_losses_are_pyros(case):
    program, args, options = prepared(case)
    number = 1 if case == "cvae" else 3  # one by one, particles draw other numbers than Pyro's
    pairs = [(pv.ELBO(number, "monte_carlo", **options), Trace_ELBO)]
    if case not in ("ss-vae, no labels", "dmm, flows"):
        pairs.append((pv.ELBO(number, **options), TraceMeanField_ELBO))
    for ours, pyros in pairs:
        theirs = pyros(number, max_plate_nesting=1, vectorize_particles=number > 1)
        losses = [seeded(objective.loss, program.model, program.guide, *args) for objective in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unlabelled_bound_agrees_with_enumeration():
    program = SSVAE()
    with torch.no_grad():
        ours = pv.ELBO(2000, "monte_carlo").bound(program.model, program.guide, FLAT).sum().item()
    enumerated = TraceEnum_ELBO(500, max_plate_nesting=1, vectorize_particles=True)
    exact = -enumerated.loss(program.model, config_enumerate(program.guide, "parallel", expand=True), FLAT)
    assert ours == pytest.approx(exact, rel=3e-3)


@pytest.mark.parametrize("gradient", ["score", "vimco"])
def test_semi_supervised_training_as_published(gradient):
    """Labelled and unlabelled batches in turn, with the auxiliary loss that trains the guide's classifier."""
    program, optim = SSVAE(), pyro.optim.Adam({"lr": 1e-2})
    losses = [
        SVI(program.model, program.guide, optim, loss=pv.IWAE(4, gradient)),
        SVI(program.model_classify, program.guide_classify, optim, loss=pv.ELBO()),
    ]
    labelled, unlabelled = slice(0, 9), slice(9, 18)
    for _ in range(25):
        for svi in losses:
            svi.step(FLAT[labelled], Y[labelled])
            svi.step(FLAT[unlabelled])
    guesses = program.encoder_y(FLAT).argmax(-1)
    assert (guesses == Y.argmax(-1)).float().mean() > 0.9


def test_auxiliary_loss_has_no_latent_site():
    """So every bound on it is exact: the classifier's log-likelihood, times the multiplier."""
    program = SSVAE()
    exact = -46 * (program.encoder_y(FLAT).log() * Y).sum().item()
    for objective in (pv.ELBO(), pv.ELBO(4), pv.ELBO(4, gradient="stl"), pv.IWAE(4), pv.RWS(4)):
        loss = objective.loss(program.model_classify, program.guide_classify, FLAT, Y)
        assert loss == pytest.approx(exact, rel=1e-5)


def test_without_an_output_the_cvae_bounds_nothing():
    """At test time the guide is the prior and there is no observation: log 1."""
    program, (xs, _) = CVAE(), quadrants()
    for objective in (pv.ELBO(3), pv.ELBO(3, "monte_carlo"), pv.IWAE(3)):
        bound = objective.bound(program.model, program.guide, xs)
        torch.testing.assert_close(bound, torch.zeros(len(xs)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["dmm", "dmm, flows"])
@pytest.mark.parametrize("objective", [pv.ELBO(3, "monte_carlo"), pv.IWAE(3)], ids=repr)
def test_padding_counts_nothing(objective, case):
    program, (x, packed, mask, lengths), _ = prepared(case)
    padded = torch.where(mask[..., None] > 0, x, 1 - x)
    bounds = [
        seeded(objective.bound, program.model, program.guide, steps, packed, mask, lengths) for steps in (x, padded)
    ]
    torch.testing.assert_close(*bounds)
    assert (bounds[0][lengths == 1] > bounds[0][lengths == 4].max()).all()


@pytest.mark.parametrize("name", SCALE_PER_SITE)
def test_annealing_trains_as_beta_does(name):
    """Both anneal the KL, one by a scale at each latent site, one by the objective, from one seed in the same steps."""
    args, factors = sequences(), [0.2, 0.4, 0.6, 0.8, 1.0]
    runs = []
    for beta in (1.0, lambda step: factors[step]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program, objective = DMM(), OBJECTIVES[name]()
        objective.beta = beta
        svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
        runs.append([svi.step(*args, factor if beta == 1.0 else 1.0) for factor in factors])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert len(set(runs[0])) == len(factors)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_beta_anneals_each_datum(kl):
    program, args = DMM(), sequences()
    beta, plain = pv.ELBO(3, kl, beta=0.5), pv.ELBO(3, kl)
    bound = seeded(beta.bound, program.model, program.guide, *args)
    assert bound.shape == (len(args[0]),)
    annealed = seeded(plain.loss, program.model, program.guide, *args, 0.5)
    assert -bound.sum().item() == pytest.approx(annealed, rel=1e-5)


SCALES_DIFFER = (
    r"scales differ between sites: expected one scale for the whole datum, got 0.5 at model site 'z_1' and 1.0 at "
    r"model site 'obs_x_1'\. .*pv\.ELBO's .*loss"
)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in SCALE_PER_SITE])
def test_annealing_scales_are_refused_where_a_datum_has_one_weight(name):
    program, args = DMM(), sequences()
    objective = OBJECTIVES[name]()
    with pytest.raises(ValueError, match=SCALES_DIFFER):
        SVI(program.model, program.guide, pyro.optim.Adam({}), loss=objective).step(*args, 0.5)
    objective.loss(program.model, program.guide, *args, 1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_annealing_scales_have_no_bound_per_datum(name):
    program, args = DMM(), sequences()
    with pytest.raises(ValueError, match=SCALES_DIFFER):
        OBJECTIVES[name]().bound(program.model, program.guide, *args, 0.5)


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_latent_class_can_not_be_reparameterised(name):
    program = SSVAE()
    message = (
        r"guide site 'y' can't be reparameterised: expected a distribution with rsample, got OneHotCategorical, .*"
        r"gradient='score'.*gradient='vimco' with at least 2 particles"
    )
    svi = SVI(program.model, program.guide, pyro.optim.Adam({}), loss=OBJECTIVES[name]())
    with pytest.raises(ValueError, match=message):
        svi.step(FLAT)
    assert svi.step(FLAT, Y) > 0


@pytest.mark.parametrize("gradient", ["score", "vimco"])
def test_closed_form_wants_one_order_of_class_and_style(gradient):
    program = SSVAE()
    message = r"one order, got \['z', 'y'\] in the model and \['y', 'z'\] in the guide.*Reorder.*kl='monte_carlo'"
    with pytest.raises(pv.NoClosedFormError, match=message):
        pv.ELBO(4, "analytic", gradient).loss_and_grads(program.model, program.guide, FLAT)


def test_flows_have_no_closed_form():
    program, args = DMM(num_iafs=1), sequences()
    message = r"no closed form at site 'z_1' for KL\(TransformedDistribution \|\| Normal\).*kl='monte_carlo'"
    with pytest.raises(pv.NoClosedFormError, match=message):
        pv.ELBO(4).loss(program.model, program.guide, *args)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_boolean_indexing_fails_for_many_particles_at_once(name):
    program, args = CVAE(), quadrants()
    svi = SVI(program.model, program.guide, pyro.optim.Adam({}), loss=OBJECTIVES[name]())
    with pytest.raises(IndexError, match=r"shape of the mask \[18, 16\]") as caught:
        svi.step(*args)
    (note,) = (note for note in caught.value.__notes__ if "particles at once" in note)
    assert "ran the program for 4 particles at once" in note
    assert "leading dimension of 4" in note
    assert "pass vectorize_particles=False" in note


@pytest.mark.parametrize(("case", "site"), [("cvae", "y"), ("dmm", "obs_x_1")])
def test_dreams_need_an_argument_to_take_the_place_of(case, site):
    program, args, options = prepared(case)
    message = f"expected model site '{site}' to observe an argument as it is, or reshaped, got other data.*sleep=0"
    with pytest.raises(ValueError, match=message):
        pv.RWS(4, sleep=0.5, **options).loss_and_grads(program.model, program.guide, *args)
