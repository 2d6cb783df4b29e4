"""A program as an argument: model and guide, a pair, a tuple, or anything that has both; in every public function."""

from __future__ import annotations

import functools
import inspect
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv


@pytest.fixture
def vae():
    return pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")


def calls(x, path):
    """Every public function that takes a program, as a function of the program."""
    few = {"seed": 0, "progress": False}
    return {
        "bound": lambda *p: pv.ELBO().bound(*p, x),
        "loss": lambda *p: pv.IWAE(4).loss(*p, x),
        "differentiable_loss": lambda *p: pv.IWAE(4).differentiable_loss(*p, x),
        "loss_and_grads": lambda *p: pv.IWAE(4, "dreg").loss_and_grads(*p, x),
        "module": lambda *p: pv.ELBO()(*p)(x),
        "log_weights": lambda *p: pv.log_weights(*p, x, num_particles=3),
        "log_likelihood": lambda *p: pv.log_likelihood(*p, x, 30, **few).per_datum,
        "compare": lambda *p: pv.compare(*p, x, [pv.ELBO()], repeats=2, **few).bound.to_numpy(),
        "ais": lambda *p: pv.ais(*p, x, 5, 2, **few).per_datum,
        "bdmc": lambda *p: pv.bdmc(*p, x, 5, 2, **few).upper_per_datum,
        "gaps": lambda *p: pv.inference_gaps(*p, x, 30, num_steps=2, **few).elbo,
        "decompose_elbo": lambda *p: pv.decompose_elbo(*p, x, 2, **few).elbo.value,
        "active_units": lambda *p: pv.active_units(*p, x, 2, seed=0).kl.to_numpy(),
        "to_arviz": lambda *p: pv.to_arviz(*p, x, 3, seed=0)["posterior"]["z"].values,
        "compile_step": lambda *p: pv.compile_step(*p, pv.ELBO(), torch.optim.SGD(VAE_PARAMETERS, lr=0.0))(x),
        "fit": lambda *p: pv.fit(*p, x, pv.ELBO(), epochs=1, lr=1e-20, checkpoint=path, **few).train_bound.to_numpy(),
        "load_parameters": lambda *p: pv.load_parameters(path, *p, x),
    }


VAE_PARAMETERS: list[torch.Tensor] = []


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_every_function_takes_every_form(vae, tmp_path, without_inductor):
    x = torch.randn(6, 5)
    VAE_PARAMETERS[:] = vae.parameters()
    found = calls(x, tmp_path / "checkpoint.pt")
    forms = [
        (vae.model, vae.guide),
        (vae,),
        ((vae.model, vae.guide),),
        (types.SimpleNamespace(model=vae.model, guide=vae.guide),),
    ]
    for name, call in found.items():
        results = []
        for form in forms:
            pyro.set_rng_seed(1)
            (tmp_path / "checkpoint.pt").unlink(missing_ok=True) if name == "fit" else None
            result = call(*form)
            results.append(result if result is None else torch.as_tensor(result).detach())
        for other in results[1:]:
            assert other is None or torch.equal(other.nan_to_num(), results[0].nan_to_num()), name


def test_no_public_function_is_left_out():
    """Whatever has arguments model and guide takes a program."""
    functions = {name: getattr(pv, name) for name in pv.__all__}
    functions |= {f"Objective.{name}": getattr(pv.Objective, name) for name in vars(pv.Objective) if name[0] != "_"}
    for name, function in functions.items():
        if not inspect.isfunction(function) or name in ("Objective.program", "Objective.remember"):
            continue
        if {"model", "guide"} <= inspect.signature(function).parameters.keys():
            assert "takes_program" in function.__code__.co_qualname, name


def test_keywords_and_none_stay_valid():
    program = LinearGaussian(2, 1, 4)
    by_name = pv.log_weights(model=program.model, guide=program.guide, num_particles=2, x=program.x)
    assert by_name.shape == (2, 4)
    assert pv.ais(program.model, None, program.x, 3, 2, progress=False).per_datum.shape == (4,)
    assert pv.ais((program.model, None), program.x, 3, 2, progress=False).per_datum.shape == (4,)


def test_no_guide_is_refused_but_where_the_prior_serves():
    program = LinearGaussian(2, 1, 4)
    for call in (
        lambda: pv.IWAE(2).bound(program.model, None, program.x),
        lambda: pv.log_likelihood((program.model, None), program.x, 30),
        lambda: pv.fit((program.model, None), program.x, pv.ELBO(), epochs=1),
    ):
        with pytest.raises(pv.PyroVAEError, match="expected a guide, got None"):
            call()


def test_guides_that_are_objects_of_pyro():
    """An EasyGuide has a model and a guide, and is called itself; an AutoGuide has a model alone."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(EasyGuide):
        def guide(self, x):
            loc = pyro.param("loc", torch.zeros(()))
            with self.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc + x / 2, 0.7))

    x, easy = torch.randn(5), Guide(model)
    assert pv.ELBO(4).bound(model, easy, x).shape == (5,)
    assert pv.ELBO(4).bound(easy, x).shape == (5,)
    auto = AutoNormal(model)
    auto(x)
    assert isinstance(pv.ELBO(kl="monte_carlo").loss(model, auto, x), float)


@pytest.mark.parametrize("program", [lambda x: None, torch.zeros(3), (1, 2), (lambda x: None,), "model"])
def test_what_is_no_program_is_refused(program):
    x = torch.randn(4, 5)
    for call in (lambda: pv.ELBO().bound(program, x), lambda: pv.fit(program, x, pv.ELBO(), epochs=1)):
        with pytest.raises(pv.PyroVAEError, match=r"expected a model and a guide, or one thing that has both.*got"):
            call()


class TestModule:
    """objective(program) is a torch module."""

    def test_it_has_the_parameters_and_modes_of_a_pair(self, vae):
        loss = pv.ELBO()(vae)
        assert {id(p) for p in loss.parameters()} == {id(p) for p in vae.parameters()}
        loss.eval()
        assert not vae.training
        assert isinstance(loss, torch.nn.Module)

    def test_it_trains(self, vae):
        x = torch.randn(200, 5) + 3
        loss = pv.ELBO()(vae.model, vae.guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        before = pv.ELBO().bound(vae, x).mean()
        for _ in range(60):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        assert pv.ELBO().bound(vae, x).mean() > before + 5

    def test_a_model_that_is_a_module_counts_once(self):
        class Model(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.loc = pyro.nn.PyroParam(torch.zeros(()))

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.0))

        loss = pv.ELBO()(Model(), guide)
        assert len(list(loss.parameters())) == 1
        loss(torch.randn(3)).backward()

    def test_plain_functions_have_parameters_that_it_can_not_know(self):
        program = LinearGaussian(2, 1, 4)
        loss = pv.ELBO(kl="monte_carlo")(program.model, program.guide)
        assert torch.isfinite(loss(program.x))
        with pytest.raises(pv.PyroVAEError, match=r"can't know the parameters: .*plain functions"):
            torch.optim.Adam(loss.parameters())

    def test_one_half_of_the_modules_is_not_taken_for_the_whole(self):
        """A partial holds the decoder, and the guide has the encoder in its closure."""
        decoder, encoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)

        def model(network, x):
            pyro.module("decoder", network)

        def guide(x):
            pyro.module("encoder", encoder)

        with pytest.raises(pv.PyroVAEError, match=r"can't know the parameters: .*plain functions"):
            pv.ELBO()(functools.partial(model, decoder), guide).named_parameters()
        held = pv.ELBO()(functools.partial(model, decoder), functools.partial(model, encoder))
        assert len(list(held.parameters())) == 4


def test_one_thing_with_both_as_a_keyword_or_before_data_that_look_like_a_guide(vae):
    x = torch.randn(4, 5)
    expected = pv.ELBO().bound(vae, x).shape
    assert pv.ELBO().bound(model=vae, x=x).shape == expected

    def guide(read):
        return vae.guide(read())

    def model(read):
        return vae.model(read())

    assert pv.ELBO().bound((model, guide), lambda: x).shape == expected


def test_the_modules_of_partial_methods_are_found(vae):
    expected = dict(pv.ELBO()(vae).named_parameters()).keys()
    partial = functools.partial(vae.model), functools.partial(functools.partial(vae.guide))
    assert dict(pv.ELBO()(partial).named_parameters()).keys() == expected
    unbound = functools.partial(type(vae).model, vae), functools.partial(type(vae).guide, vae)
    assert dict(pv.ELBO()(unbound).named_parameters()).keys() == expected


def test_a_tuple_beside_a_guide_is_refused(vae):
    with pytest.raises(pv.PyroVAEError, match="got a tuple and a guide"):
        pv.ELBO().bound((vae.model, vae.guide), torch.randn(4, 5), guide=vae.guide)
