"""Traced and compiled steps against uncompiled ones, on the same random numbers; and what can't be traced, refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from helpers.quick import slow_but
from helpers.toys import Discrete, Mixed, X
from torch import nn

import pyro_vae as pv
from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.compiled.recording import users_line

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative, of the loss and of the gradient's length


class Flow(nn.Module):
    """A guide that is an autoregressive flow, whose density at a sample rests on the sample's own history."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = pv.mlp_vae((6,), latent_dim=4, hidden_dims=(8,), likelihood="gaussian", scale="learned")
        self.transform = pyro.distributions.transforms.affine_autoregressive(4, hidden_dims=[8])

    def model(self, x):
        self.vae.model(x)

    def guide(self, x):
        pyro.module("flow", self)
        with pyro.plate("data", len(x)):
            base = self.vae.posterior(x)
            pyro.sample("z", dist.TransformedDistribution(base, [self.transform]))


class TwoLayers(nn.Module):
    """z2 -> z1 -> x, with a guide from the bottom up, in networks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up2, self.down, self.down2 = (nn.Linear(a, b) for a, b in ((6, 4), (2, 4), (2, 2), (2, 6)))

    def model(self, x):
        pyro.module("layers", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.down(z2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(self.down2(z1).tanh(), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("layers", self)
        with pyro.plate("data", len(x)):
            h = self.up(x).tanh()
            z1 = pyro.sample("z1", dist.Normal(h[..., :2], h[..., 2:].exp()).to_event(1))
            h2 = self.up2(z1).tanh()
            pyro.sample("z2", dist.Normal(h2[..., :2], h2[..., 2:].exp()).to_event(1))


def mlp(dtype):
    return pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,)).to(dtype), (torch.rand(5, 6) > 0.5).to(dtype)


def conv(dtype):
    vae = pv.conv_vae((1, 8, 8), latent_dim=3, channels=(4, 4), likelihood="gaussian", scale="per_pixel")
    return vae.to(dtype), torch.randn(5, 1, 8, 8, dtype=dtype)


def flow(dtype):
    return Flow().to(dtype), torch.randn(5, 6, dtype=dtype)


def two_sites(dtype):
    return TwoLayers().to(dtype), torch.randn(5, 6, dtype=dtype)


PROGRAMS = [mlp, conv, flow, two_sites]
OBJECTIVES = {
    **{f"ELBO {kl} {k}": lambda kl=kl, k=k: pv.ELBO(k, kl) for kl in ("analytic", "monte_carlo") for k in (1, 3)},
    **{f"ELBO {g}": lambda g=g: pv.ELBO(3, "monte_carlo", g) for g in ("stl", "dreg", "score", "vimco")},
    "ELBO beta": lambda: pv.ELBO(beta=0.3),
    "ELBO schedule": lambda: pv.ELBO(beta=lambda step: 0.1 + 0.2 * step),
    "ELBO free bits": lambda: pv.ELBO(free_bits=0.2),
    **{f"IWAE {g}": lambda g=g: pv.IWAE(4, g) for g in pv.IWAE.gradients},
    **{f"Renyi {g}": lambda g=g: pv.Renyi(0.5, 4, g) for g in pv.Renyi.gradients},
    **{f"MIWAE {g}": lambda g=g: pv.MIWAE(2, 2, g) for g in pv.MIWAE.gradients},
    **{f"PIWAE {g}": lambda g=g: pv.PIWAE(2, 2, g) for g in pv.PIWAE.gradients},
    **{f"CIWAE {g}": lambda g=g: pv.CIWAE(0.3, 4, g) for g in pv.CIWAE.gradients},
    **{f"TVO {g}": lambda g=g: pv.TVO(4, 3, g) for g in pv.TVO.gradients},
    **{f"JVI {g}": lambda g=g: pv.JVI(4, 1, g) for g in pv.JVI.gradients},
    "RWS": lambda: pv.RWS(4),
    "RWS sleep": lambda: pv.RWS(4, sleep=0.5),
}


def compile_sgd(program, objective):
    """A compiled step of a module that has a model and a guide."""
    optimizer = torch.optim.SGD(list(program.parameters()), 1e-2)
    return pv.compile_step(program.model, program.guide, objective, optimizer)


def agree(program, objective, *args, steps=2):
    """Whether compiled steps give the loss and the gradients of uncompiled ones, from the same seeds."""
    parameters = list(program.parameters())
    step = compile_sgd(program, objective)
    for seed in range(steps):
        pyro.set_rng_seed(seed)
        loss = step.compute(*args)
        found = [None if p.grad is None else p.grad.clone() for p in parameters]
        pyro.set_rng_seed(seed)
        objective.step -= 1
        expected = objective.differentiable_loss(program.model, program.guide, *args)
        exact = torch.autograd.grad(expected, parameters, allow_unused=True)
        tolerance = TOLERANCE[loss.dtype]
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)
        assert [g is None for g in found] == [g is None for g in exact]
        found, exact = (torch.cat([g.flatten() for g in group if g is not None]) for group in (found, exact))
        assert (found - exact).norm() <= tolerance * exact.norm()
        step.optimizer.step()


@pytest.fixture
def default_dtype(dtype):
    torch.set_default_dtype(dtype)  # Pyro's flows make tensors of that type alone
    yield
    torch.set_default_dtype(torch.float32)


def check_all(objective, program, dtype):
    made, x = program(dtype)
    chosen = OBJECTIVES[objective]()
    if isinstance(chosen, pv.ELBO) and chosen.kl == "analytic" and program in (flow, two_sites):
        with pytest.raises(ValueError, match=r"kl='monte_carlo'|free_bits=0"):
            compile_sgd(made, chosen)(x)
        return
    agree(made, chosen, x)


# The slow test below has every case.
QUICK = [(name, mlp) for name in ("ELBO analytic 3", "ELBO vimco", "ELBO schedule", "ELBO free bits", "IWAE dreg")]
QUICK += [(name, mlp) for name in ("TVO covariance", "RWS sleep")]
QUICK += [("ELBO analytic 1", conv), ("ELBO analytic 1", flow), ("IWAE dreg", two_sites)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize(("objective", "program"), QUICK, ids=lambda value: getattr(value, "__name__", value))
def test_traced_steps_agree_with_uncompiled_ones(objective, program, dtype, default_dtype, without_inductor):
    check_all(objective, program, dtype)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize(("objective", "program"), [("ELBO schedule", mlp)])
def test_compiled_steps_agree_with_uncompiled_ones(objective, program, dtype, default_dtype):
    check_all(objective, program, dtype)


def in_every_case(test):
    test = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)(test)
    test = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)(test)
    return pytest.mark.parametrize("objective", OBJECTIVES)(test)


@pytest.mark.slow
@in_every_case
def test_all_traced_steps_agree_with_uncompiled_ones(objective, program, dtype, default_dtype, without_inductor):
    check_all(objective, program, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiled_steps_of_each_objective_agree_with_uncompiled_ones(objective, dtype, default_dtype):
    check_all(objective, mlp, dtype)


@pytest.mark.exhaustive
@in_every_case
def test_all_compiled_steps_agree_with_uncompiled_ones(objective, program, dtype, default_dtype):
    check_all(objective, program, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("toy", [pytest.param(Discrete, marks=pytest.mark.slow), Mixed], ids=lambda toy: toy.__name__)
@pytest.mark.parametrize("objective", ["ELBO score", "IWAE vimco", "TVO covariance", "RWS"])
def test_guides_that_cannot_be_reparameterised(objective, toy, without_inductor):
    chosen = pv.ELBO(3, "monte_carlo", "score") if objective == "ELBO score" else OBJECTIVES[objective]()
    agree(toy(), chosen, X)


class Program:
    """A model and a guide as functions, with their parameters."""

    def __init__(self, model, guide, *parameters):
        self.model, self.guide, self.parameters = model, guide, lambda: list(parameters)


@pytest.mark.slow
def test_global_latents_masks_scales_subsamples_and_constrained_parameters(without_inductor):
    pyro.param("scale", torch.tensor(0.8, dtype=torch.float64), constraint=dist.constraints.positive)
    gain = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(12, dtype=torch.float64)
    mask = x > -1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=5) as rows, pyro.poutine.mask(mask=mask[rows]):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            with pyro.poutine.scale(scale=torch.tensor(0.5, dtype=torch.float64)):
                pyro.sample("x", dist.Normal(z, pyro.param("scale")), obs=x[rows])

    def guide(x):
        pyro.sample("mean", dist.Normal(gain, 0.3))
        with pyro.plate("data", len(x), subsample_size=5) as rows, pyro.poutine.mask(mask=mask[rows]):
            pyro.sample("z", dist.Normal(gain * x[rows], 0.5))

    parameters = gain, pyro.get_param_store()._params["scale"]
    agree(Program(model, guide, *parameters), pv.ELBO(kl="monte_carlo"), x, steps=4)
    agree(Program(model, guide, *parameters), pv.ELBO(2, gradient="stl"), x)


class Noisy(nn.Module):
    """A VAE with dropout and batch norm, the latter found in a closure of the guide."""

    def __init__(self, normalise) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 6))
        self.normalise = [normalise]

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.normalise[0](self.encoder(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropout_and_batch_norm(inductor, monkeypatch):
    if not inductor:
        monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
    x = torch.randn(8, 6)
    normalise = nn.BatchNorm1d(4)
    program, twin = Noisy(normalise), Noisy(nn.BatchNorm1d(4))
    twin.load_state_dict(program.state_dict())
    step = compile_sgd(program, pv.ELBO())
    optimizer = torch.optim.SGD(list(twin.parameters()), 1e-2)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = step(x)
        pyro.set_rng_seed(seed)
        expected = pv.ELBO().differentiable_loss(twin.model, twin.guide, x)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    other = twin.normalise[0]
    assert normalise.num_batches_tracked == other.num_batches_tracked == 3
    torch.testing.assert_close(normalise.running_mean, other.running_mean)
    program.eval()
    normalise.eval()
    pyro.set_rng_seed(0)
    loss = step.compute(x)
    twin.eval()
    other.eval()
    pyro.set_rng_seed(0)
    torch.testing.assert_close(loss.item(), pv.ELBO().loss(twin.model, twin.guide, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_draws_are_those_of_torch(dtype):
    def draw(p):
        empty = torch.empty_like(p)
        filled = [
            empty.clone().uniform_(),
            empty.clone().exponential_(),
            empty.clone().cauchy_(),
            empty.clone().log_normal_(),
        ]
        discrete = [
            torch.bernoulli(p),
            empty.clone().bernoulli_(p),
            torch.poisson(3 * p),
            torch.multinomial(p, 2),
            torch.randperm(7),
        ]
        discrete += [
            torch.binomial(torch.full_like(p, 10), p),
            torch.nn.functional.dropout(p),
            empty.clone().geometric_(0.3),
        ]
        return (
            *filled,
            *discrete,
            torch.rand_like(p),
            torch.normal(p, 1.0),
            torch._standard_gamma(p),
            torch._sample_dirichlet(p),
        )

    p = torch.rand(5, 6, dtype=dtype)
    compiled = CompiledFunction(draw, [])
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = draw(p)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(p), expected)


@pytest.mark.slow
def test_gradients_of_portions_add_up(without_inductor):
    program, x = mlp(torch.float64)
    step = compile_sgd(program, pv.IWAE(4))
    parameters = list(program.parameters())
    portions = x.split(2)
    pyro.set_rng_seed(0)
    expected = [[step.compute(part), *[parameter.grad for parameter in parameters]] for part in portions]
    step.optimizer.zero_grad()
    pyro.set_rng_seed(0)
    losses = [step.accumulate(part) for part in portions]
    torch.testing.assert_close(torch.stack(losses), torch.stack([loss for loss, *_ in expected]))
    for parameter, *gradients in zip(parameters, *[gradients for _, *gradients in expected], strict=True):
        torch.testing.assert_close(parameter.grad, sum(gradients))
    assert len(portions) == step.objective.step / 2 > 1


def test_noise_is_new_at_each_step_and_follows_the_seed(without_inductor):
    program, x = mlp(torch.float32)
    step = compile_sgd(program, pv.ELBO())
    pyro.set_rng_seed(3)
    losses = [step.compute(x).item() for _ in range(3)]
    assert len(set(losses)) == 3
    pyro.set_rng_seed(3)
    assert [step.compute(x).item() for _ in range(3)] == losses


def test_compiling_leaves_the_generators_alone(without_inductor):
    program, x = mlp(torch.float32)
    pyro.set_rng_seed(1)
    first = compile_sgd(program, pv.ELBO()).compute(x)  # compiled and run
    pyro.set_rng_seed(1)
    expected = pv.ELBO().loss(program.model, program.guide, x)
    assert first.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_arguments_of_several_shapes_by_keyword_and_constants(without_inductor):
    program, x = mlp(torch.float64)
    step = compile_sgd(program, pv.ELBO())
    for args, kwargs in (
        ((x,), {}),
        ((x[:2],), {}),
        ((), {"x": x}),
        ((x,), {"subsample_size": 2}),
        ((x,), {"subsample_size": 3}),
    ):
        for seed in (0, 1):
            pyro.set_rng_seed(seed)
            loss = step.compute(*args, **kwargs)
            pyro.set_rng_seed(seed)
            assert loss.item() == pytest.approx(pv.ELBO().loss(program.model, program.guide, *args, **kwargs))
    assert len(step.loss_and_gradients.compiled) == 5


def test_a_new_constant_at_each_step_is_refused(without_inductor, monkeypatch):
    monkeypatch.setattr("pyro_vae.compiled.function.MAX_KINDS", 2)
    program, x = mlp(torch.float64)
    step = compile_sgd(program, pv.ELBO())
    step(x, subsample_size=2)
    step(x, subsample_size=3)
    step(x, subsample_size=2)
    with pytest.raises(
        ValueError, match=r"compiled for 2 kinds of arguments.*a tensor for each argument that changes.*torch.tensor"
    ):
        step(x, subsample_size=4)


def test_pyros_optimiser_steps_as_in_svi(without_inductor):
    steps = []
    for compiled in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program, x = mlp(torch.float64)
        optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "clip_norm": 1.0})
        svi = pyro.infer.SVI(program.model, program.guide, optimizer, loss=pv.ELBO())
        step = pv.compile_step(program.model, program.guide, pv.ELBO(), optimizer) if compiled else svi.step
        for _ in range(3):
            step(x)
        steps.append(torch.cat([p.flatten() for p in program.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-12)


# Refusals ----------------------------------------------------------------------------------------------------------


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)) + 0 * x, 1.0))


def reading(read):
    """A model that does something with z before it observes x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = read(z, x)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


calls = {"number": 0}


def branch(z, x):
    if z.mean() > 0:
        return z
    return 2 * z


def item(z, x):
    return z * x.mean().item()


def array(z, x):
    return z * float(x.numpy().mean())


def listed(z, x):
    return z * x.tolist()[0]


def masked(z, x):
    return z + z[x > 0].sum()


def parameter(z, x):
    return z * pyro.param("loc").item()


def counter(z, x):
    calls["number"] += 1
    return z * calls["number"]


def numpy_noise(z, x):
    return z + torch.tensor(np.random.rand())


READING = {branch: "if z.mean", item: "item()", array: "x.numpy()", listed: "tolist()", masked: "z[x > 0]"}


@pytest.mark.parametrize("read", [*READING, parameter], ids=lambda read: read.__name__)
def test_reading_a_value_is_refused_by_its_line(read):
    torch.manual_seed(0)
    line = READING.get(read, 'pyro.param("loc").item()')
    pyro.param("loc", torch.tensor(0.1))
    step = pv.compile_step(reading(read), normal_guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="can't be compiled, since it reads a tensor's value") as caught:
        step(torch.randn(4))
    message = str(caught.value)
    assert f"test_compiled.py:{read.__code__.co_firstlineno + 1}, in {read.__name__}" in message
    assert line in message
    assert "compile=False" in message


def test_code_without_a_file_is_named_by_its_line():
    names: dict = {}
    exec("def pasted(z, x):\n    return z * x.mean().item()\n", names)
    step = pv.compile_step(reading(names["pasted"]), normal_guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="at <string>:2, in pasted: expected"):
        step(torch.randn(4))


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (counter, r"does something else when it runs again.*counter.*compile=False"),
        (numpy_noise, "draws from Python's or NumPy's random numbers"),
    ],
)
def test_what_would_be_frozen_is_refused(read, words):
    step = pv.compile_step(reading(read), normal_guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match=words):
        step(torch.randn(4))


class Average(nn.Module):
    """A guide with an average of the data, which it updates in one of several ways, or only watches."""

    def __init__(self, how, used=True):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.gain, self.how, self.used = nn.Parameter(torch.tensor(0.4)), how, used

    def forward(self, x):
        with torch.no_grad():
            new = 0.9 * self.average + 0.1 * x.mean()
        if self.how == "data":
            self.average.data = new
        elif self.how == "set_":
            self.average.set_(new)
        elif self.how == "attribute":
            self.average = new
        elif self.how == "constant":
            self.average = torch.ones(())
        else:
            self.average.data.copy_(new)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gain * x + (self.average if self.used else 0.0), 1.0))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("data", r"test_compiled.py:\d+, in forward: `self.average.data = new`: .* tensor.data.copy_"),
        ("set_", r"in forward: `self.average.set_\(new\)`"),
        ("attribute", r"assigns a module's 'average' anew .* self.average.copy_\(new\)"),
        ("copy_", None),
        ("constant", None),
    ],
)
def test_tensors_that_a_program_replaces_are_refused_by_name(how, words, used, without_inductor):
    torch.manual_seed(0)
    x, own, other = torch.randn(6), Average(how, used), Average(how, used)
    step = pv.compile_step(reading(lambda z, x: z), own, pv.ELBO(), torch.optim.SGD(own.parameters(), 0.1))
    if words is not None:
        with pytest.raises(pv.PyroVAEError, match=words):
            step(x)
        return
    for _ in range(3):
        step(x)
        other(x)
    torch.testing.assert_close(own.average, other.average)


def test_no_except_of_the_program_swallows_a_refusal():
    def swallowing(z, x):
        try:
            return z * x.mean().item()
        except Exception:
            return z

    step = pv.compile_step(reading(swallowing), normal_guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="reads a tensor's value"):
        step(torch.randn(4))


def in_place(state, x):
    """A program that writes to a tensor of its own, and to its argument, at each run."""
    gain = torch.tensor(0.4, requires_grad=True)

    def guide(x):
        state.add_(1.0)
        x.add_(1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x + state, 1.0))

    return guide, gain


@pytest.mark.parametrize("inductor", [False, True])
def test_what_a_program_writes_in_place_is_written_once_a_step(inductor, monkeypatch):
    if not inductor:
        monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
    state, x = torch.zeros(()), torch.zeros(4)
    guide, gain = in_place(state, x)
    step = pv.compile_step(reading(lambda z, x: z), guide, pv.ELBO(), torch.optim.SGD([gain], 0.1))
    for number in (1, 2, 3):
        step(x)
        assert (state.item(), x[0].item()) == (number, number)


@pytest.mark.slow
def test_changes_of_program_and_optimiser_are_noticed(without_inductor):
    program, x = mlp(torch.float64)
    decoder = program.likelihood.decoder[-1]
    first, *rest = program.parameters()
    optimizer = torch.optim.SGD(rest, 1e-2)
    objective = pv.ELBO()
    step = pv.compile_step(program.model, program.guide, objective, optimizer)

    def agrees():
        pyro.set_rng_seed(0)
        loss = step.compute(x).item()
        pyro.set_rng_seed(0)
        return loss == pytest.approx(objective.loss(program.model, program.guide, x), rel=1e-10)

    assert agrees()
    assert first.grad is None
    optimizer.add_param_group({"params": [first]})
    assert agrees()
    assert first.grad is not None
    first.requires_grad_(False)
    before = first.clone()
    step(x)
    assert torch.equal(first, before)
    decoder.weight = nn.Parameter(2 * decoder.weight.detach())
    assert agrees()
    objective.beta = 0.25
    assert agrees()


def test_a_cleared_parameter_store_is_noticed(without_inductor):
    step = pv.compile_step(reading(lambda z, x: z), normal_guide, pv.ELBO(), pyro.optim.SGD({"lr": 0.1}))
    x = torch.randn(4)
    step(x)
    pyro.clear_param_store()
    step(x)
    assert pyro.get_param_store()["loc"].item() != pytest.approx(0.1)


def test_gradients_are_tensors_of_their_own(without_inductor):
    a, b = (torch.tensor(0.1, requires_grad=True) for _ in "ab")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a + b + 0 * x, 1.0))

    step = pv.compile_step(reading(lambda z, x: z), guide, pv.ELBO(), torch.optim.SGD([a, b], 0.1))
    step.compute(torch.randn(4))
    assert a.grad.data_ptr() != b.grad.data_ptr()


def test_handlers_around_a_step_are_refused():
    program, x = mlp(torch.float32)
    step = compile_sgd(program, pv.ELBO())
    with pyro.poutine.scale(scale=0.1), pytest.raises(ValueError, match=r"compiled code runs no Pyro handlers.*inside"):
        step(x)


def test_constants_that_are_equal_but_not_the_same(without_inductor):
    gain = torch.tensor(0.4, requires_grad=True)

    def model(x, flag):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 if flag is True else 9.0), obs=x)

    def guide(x, flag):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, 1.0))

    step = pv.compile_step(model, guide, pv.ELBO(), torch.optim.SGD([gain], 0.1))
    x = torch.randn(4)
    for flag in (True, 1):
        pyro.set_rng_seed(0)
        loss = step.compute(x, flag).item()
        pyro.set_rng_seed(0)
        assert loss == pytest.approx(pv.ELBO().loss(model, guide, x, flag), rel=1e-6)


def test_labels_and_one_hot(without_inductor):
    net = nn.Linear(3, 1)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * x, 1.0))
            loc = z + net(nn.functional.one_hot(y, 3).float()).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    agree(Program(model, guide, *net.parameters()), pv.IWAE(3), torch.randn(6), torch.tensor([0, 1, 2, 2, 1, 0]))


def test_dropout_in_a_guide_that_must_run_again_is_refused():
    class Dropping(TwoLayers):
        def guide(self, x):
            super().guide(nn.functional.dropout(x, 0.5, self.training))

    program = Dropping()
    x = torch.randn(5, 6)
    for compile in (False, True):
        with pytest.raises(ValueError, match=r"has another density when the guide runs again.*eval\(\)"):
            pv.fit(program.model, program.guide, x, pv.ELBO(2, gradient="stl"), epochs=1, compile=compile)


def test_a_guide_beyond_the_models_support_is_refused_by_compiled_evaluation():
    loc = pyro.param("loc", torch.tensor(2.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones(())))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc") + 0 * x, 0.1))

    x = loc.detach() + torch.randn(4)
    for evaluate in (
        lambda: pv.log_likelihood(model, guide, x, 50, compile=True),
        lambda: pv.compare(model, guide, x, pv.IWAE(2), compile=True),
    ):
        with pytest.raises(ValueError, match="compiled code does not check samples: expected a guide on the support"):
            evaluate()


@pytest.mark.parametrize("compile", [False, True])
def test_fit_takes_supports_that_differ_between_data_and_sites_that_do_not_look(compile, without_inductor):
    loc = pyro.param("loc", torch.tensor(0.3))

    def model(x, n, grey):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Binomial(n, logits=z), obs=x)
            pyro.sample("grey", dist.Bernoulli(logits=z, validate_args=False), obs=grey)

    def guide(x, n, grey):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc") + 0 * x, 1.0))

    n = torch.arange(1.0, 26.0)
    history = pv.fit(model, guide, (n - 1, n, torch.rand(25)), pv.ELBO(), epochs=1, batch_size=10, compile=compile)
    assert history.train_bound.isna().sum() == 0
    assert loc.item() != pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.Adam, "expected an optimizer that steps on one gradient.*got the class Adam"),
        (None, "expected an optimizer.*got NoneType"),
        (torch.optim.LBFGS([torch.zeros(1, requires_grad=True)]), "expected an optimizer.*got LBFGS"),
    ],
)
def test_optimisers_that_are_none(optimizer, words):
    program, _ = mlp(torch.float32)
    with pytest.raises(ValueError, match=words):
        pv.compile_step(program.model, program.guide, pv.ELBO(), optimizer)


def test_arguments_that_are_no_constants():
    program, x = mlp(torch.float32)
    with pytest.raises(ValueError, match=r"compiled code expected tensors, or constants.*got ndarray.*torch.as_tensor"):
        compile_sgd(program, pv.ELBO())(x.numpy())


def test_refusals_of_an_uncompiled_run_come_first():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    step = pv.compile_step(model, guide, pv.IWAE(2), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="model site 'z' is a latent site outside the batch plate"):
        step(torch.randn(4))


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (pyro.infer.Trace_ELBO(), "expected an objective of pyro_vae, got Pyro's Trace_ELBO"),
        (pyro.infer.TraceEnum_ELBO(), "got Pyro's TraceEnum_ELBO: .*run it uncompiled"),
        (pv.IWAE(4, chunk_size=2), "without chunk_size, got 2"),
        (pv.IWAE(4, vectorize_particles=False), "expected vectorize_particles=True, got False"),
    ],
)
def test_objectives_that_are_no_one_graph(objective, words):
    program, x = mlp(torch.float32)
    with pytest.raises(ValueError, match=words):
        compile_sgd(program, objective)
    with pytest.raises(ValueError, match=words):
        pv.fit(program.model, program.guide, x, objective, epochs=1, compile=True)


def test_an_optimiser_of_other_parameters():
    program, x = mlp(torch.float32)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(
        ValueError, match=r"expected an optimizer of parameters that the loss depends on, got one of 1 others"
    ):
        pv.compile_step(program.model, program.guide, pv.ELBO(), other)(x)


def test_a_program_without_parameters():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="expected a program with parameters to train, got none"):
        pv.compile_step(reading(lambda z, x: z), guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))(torch.randn(4))


@pytest.mark.slow
def test_a_constant_that_was_read_and_changes_is_refused(without_inductor):
    program, x = flow(torch.float32)
    step = compile_sgd(program, pv.ELBO(gradient="stl"))
    step(x)
    program.transform.arn.permutation.copy_(program.transform.arn.permutation.flip(0))
    with pytest.raises(ValueError, match=r"a tensor of integers that the program read.*has changed since"):
        step(x)


# What is built on it -------------------------------------------------------------------------------------------------


def test_fit_compiled_ends_where_fit_does(without_inductor, tmp_path):
    x, histories, ends = torch.randn(50, 6, dtype=torch.float64), [], []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", scale="learned").double()
        options = {"batch_size": 16, "validation": x[:10], "seed": 1, "compile": compile}  # the last minibatch has 2
        histories.append(pv.fit(vae.model, vae.guide, x, pv.ELBO(beta=lambda s: s / 12), epochs=3, **options))
        ends.append(torch.cat([p.flatten() for p in vae.parameters()]))
    columns = ["train_bound", "validation_bound"]
    pd.testing.assert_frame_equal(*[history[columns] for history in histories], rtol=1e-9)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_compiled_run_goes_on_from_its_checkpoint_bit_for_bit(without_inductor, tmp_path):
    x, ends = torch.randn(40, 6), []
    for pieces in ((4,), (1, 4)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        for epochs in pieces:
            path = tmp_path / f"{len(pieces)}.pt"
            options = {"batch_size": 20, "seed": 1, "checkpoint": path}
            pv.fit(vae.model, vae.guide, x, pv.IWAE(3), epochs=epochs, compile=True, **options)
        ends.append([p.detach().clone() for p in vae.parameters()])
    assert all(map(torch.equal, *ends))
    with pytest.raises(ValueError, match="other settings: expected compile=True, got compile=False"):
        pv.fit(vae.model, vae.guide, x, pv.IWAE(3), epochs=5, **options)


def test_fit_refuses_before_training_what_cannot_be_traced():
    x = torch.randn(8)
    pyro.param("loc", torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"in branch: `if z.mean"):
        pv.fit(reading(branch), normal_guide, x, pv.ELBO(), epochs=1, compile=True)
    assert pyro.param("loc").item() == pytest.approx(0.1)


def test_fit_compiled_stops_at_a_loss_that_is_not_finite(without_inductor):
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", scale="learned")
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch"):
        pv.fit(vae.model, vae.guide, 1e18 * torch.randn(64, 6), pv.ELBO(), epochs=30, lr=10.0, compile=True)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_log_likelihood_is_exact_within_its_error(inductor, monkeypatch):
    if not inductor:
        monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
    program = LinearGaussian(3, 2, 6, wrong=True)
    ll = pv.log_likelihood(program.model, program.guide, program.x, 20_000, compile=True, seed=0)
    assert ((ll.per_datum - program.log_evidence()).abs() / ll.per_datum_error).max() < 4
    assert ll.num_samples == 20_000
    with pytest.raises(ValueError, match="expected vectorize_particles=True with compile=True"):
        pv.log_likelihood(program.model, program.guide, program.x, 10, vectorize_particles=False, compile=True)


def test_code_is_kept_from_call_to_call_while_the_program_stays(monkeypatch):
    """The same graph of another call, of other weights too; not that of another constant."""
    compiled = []
    monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: compiled.append(graph) or graph)
    x, constant = torch.randn(6), [1.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(constant[0] * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    def difference():
        found = (pv.log_likelihood(model, guide, x, 40, compile=each, seed=0).per_datum for each in (True, False))
        return float((next(found) - next(found)).abs().max())

    assert difference() < 1e-5
    assert difference() < 1e-5
    pyro.get_param_store()["loc"] = torch.tensor(3.0)
    assert difference() < 1e-5
    assert len(compiled) == 1
    constant[0] = 2.0
    assert difference() < 1e-5
    assert len(compiled) == 2


@pytest.mark.slow
def test_compiled_log_likelihood_of_several_portions_and_batches(without_inductor, monkeypatch):
    monkeypatch.setattr("pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE", 3 * 2 * 70)
    program = LinearGaussian(3, 2, 7, wrong=True)
    for number in (50, 700):  # two data in a minibatch, and the last alone; ten portions
        ll = pv.log_likelihood(program.model, program.guide, program.x, number, compile=True, seed=0)
        assert len(ll.per_datum) == 7
        assert ((ll.per_datum - program.log_evidence()).abs() / ll.per_datum_error).max() < 5


@pytest.mark.slow
def test_compiled_log_likelihood_of_refined_proposals_in_several_batches(without_inductor, monkeypatch):
    monkeypatch.setattr("pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE", 3 * 700)
    program = LinearGaussian(3, 2, 7, wrong=True)
    ll = pv.log_likelihood(program.model, program.guide, program.x, 200, refine=True, compile=True, seed=0)
    assert ((ll.per_datum - program.log_evidence()).abs() / ll.per_datum_error).max() < 5
    assert (ll.ess > 130).all()  # the guide's own is 16 to 180


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "inductor"), slow_but([("prior", False)], product(("prior", "guide"), (False, True)))
)
def test_compiled_annealing_moves_the_same_chains(inductor, start, monkeypatch):
    if not inductor:
        monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
    program = LinearGaussian(3, 2, 5, wrong=True)
    monkeypatch.setattr("pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE", 2 * 4 * 3)  # minibatches of two data, and of one
    options = {"start": start, "seed": 0, "progress": False}
    for anneal in (pv.ais, pv.bdmc):
        found = [
            anneal(program.model, program.guide, program.x, 20, 4, compile=compile, **options)
            for compile in (False, True)
        ]
        plain, compiled = (each.lower if anneal is pv.bdmc else each for each in found)
        # The same noise moves them; in float32, a chain may accept what another rejects by rounding.
        torch.testing.assert_close(compiled.per_datum, plain.per_datum, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="expected vectorize_particles=True with compile=True"):
        pv.ais(program.model, program.guide, program.x, 5, 2, compile=True, vectorize_particles=False)


@pytest.mark.slow
def test_compare_compiled_measures_the_same(without_inductor):
    program, x = mlp(torch.float64)
    objectives = [pv.ELBO(), pv.IWAE(4, "dreg")]
    tables = [
        pv.compare(program.model, program.guide, x, objectives, repeats=3, compile=compile, seed=0)
        for compile in (False, True)
    ]
    columns = ["bound", "estimator_std", "grad_snr_model", "grad_snr_guide"]
    pd.testing.assert_frame_equal(*[table[columns] for table in tables], rtol=1e-9)
    with pytest.raises(ValueError, match="without chunk_size"):
        pv.compare(program.model, program.guide, x, pv.IWAE(4, chunk_size=2), compile=True)


def _conditional(y):
    vae = pv.mlp_conditional_vae((3,), latent_dim=2, label_dim=3, hidden_dims=(4,))
    return vae, (torch.rand(20, 3).round(), y), r"labels from 0 to 2, got 0 to 7"


def _semi_supervised(y):
    vae = pv.mlp_semi_supervised_vae((3,), latent_dim=2, num_classes=3, hidden_dims=(4,))
    return vae, (torch.rand(20, 3).round(), y), r"labels from -1 to 2, got 0 to 7"


def _masked(_):
    x, mask = torch.rand(20, 3).round(), torch.rand(20, 3) > 0.5
    x[17], mask[17] = 0.5, True
    return (
        pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,)),
        (x, mask),
        r"a Bernoulli likelihood expected x of zeros and ones",
    )


def _off_grid(_):
    x = torch.randint(16, (20, 3)) / 15
    x[17] = 0.5
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="discretized_logistic", levels=16)
    return vae, (x,), r"data in the support of model site 'x'.*row \d+|DiscretizedLogistic likelihood expected x"


@pytest.mark.slow
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("make", [_conditional, _semi_supervised, _masked, _off_grid])
def test_compiled_fit_refuses_what_the_pair_refuses(make, loader, without_inductor):
    y = torch.arange(20) % 3
    y[17] = 7
    vae, data, message = make(y)
    options = {"batch_size": 5}
    if loader:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), **options)
        options = {}
    with pytest.raises(ValueError, match=message):
        pv.fit(vae.model, vae.guide, data, pv.ELBO(gradient="score"), epochs=1, compile=True, **options)


def test_the_line_named_is_the_users_own_also_below_a_function_of_the_package():
    """The error arises in objectives/; the line is that of this file."""

    def my_model():
        pv.JVI(1, order=3)

    with pytest.raises(ValueError) as error:
        my_model()
    assert "test_compiled.py" in users_line(error.value)
    assert "in my_model" in users_line(error.value)


@pytest.mark.slow
def test_modules_that_a_run_makes_anew_do_not_compile_it_anew(without_inductor):
    """A conditioned flow is a module of each run; minibatches of two sizes take turns."""
    torch.manual_seed(0)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(4,), posterior=pv.FlowPosterior)
    function = pv.compile_step(vae, pv.ELBO(kl="monte_carlo"), torch.optim.SGD(vae.parameters(), lr=0.0))
    x = (torch.rand(7, 5) > 0.5).float()
    for _ in range(6):
        for rows in (x[:4], x[4:]):
            function(rows)
    compiled = function.loss_and_gradients.compiled
    assert [len(same_kind) for same_kind in compiled.values()] == [1, 1]
