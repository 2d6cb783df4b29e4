"""Densities, draws and reports are of float32 at least: under autocast, and in programs of half precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

HALF = [torch.bfloat16, torch.float16]


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


W = torch.randn(2, 784, generator=torch.Generator().manual_seed(0)) * 0.2
X = torch.bernoulli(torch.full((20, 784), 0.4), generator=torch.Generator().manual_seed(1))


class Linear(torch.nn.Module):
    """A network of products that PyTorch's layers have no part in."""

    def forward(self, z):
        return z @ W


def products():
    """A pair whose network, likelihood and closed-form KL are products, which autocast takes in half precision."""
    likelihood = pv.Bernoulli(Linear(), (784,))

    class Pair:
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 0.7]])))
                pyro.sample("x", likelihood(z), obs=x)

        def guide(self, x):
            loc = x @ W.T / 100 + pyro.param("shift", torch.tensor(0.123456789))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(loc, torch.tensor([[0.2, 0.1], [0.1, 0.3]])))

    return Pair()


def gradient(objective):
    def compute(pair):
        pyro.clear_param_store()
        loss = objective.loss_and_grads(pair, X)
        return torch.tensor([loss, pyro.param("shift").grad])

    return compute


REPORTS = {
    "log_weights": lambda pair: pv.log_weights(pair, X, num_particles=3),
    "bound": lambda pair: pv.ELBO().bound(pair, X),
    "ELBO": gradient(pv.ELBO(2)),
    "DReG": gradient(pv.IWAE(3, "dreg")),
    "VIMCO": gradient(pv.IWAE(2, "vimco", vectorize_particles=False)),
    "module": lambda pair: pv.IWAE(2)(pair)(X),
    "log_likelihood": lambda pair: pv.log_likelihood(pair, X, 50, progress=False).per_datum,
    "ais": lambda pair: pv.ais(pair, X, 3, 2, start="guide", progress=False).per_datum,
    "compare": lambda pair: torch.tensor(pv.compare(pair, X, pv.IWAE(2), repeats=2, progress=False).bound.iloc[0]),
}


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("report", REPORTS)
def test_autocast_changes_no_arithmetic_outside_of_layers(report, dtype):
    """To the last bit: also the derivatives, whose products have the types of the forward pass."""
    results = []
    for surrounding in (autocast(dtype), torch.autocast("cpu", enabled=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with surrounding:
            results.append(REPORTS[report](products()))
            assert torch.is_autocast_enabled("cpu") == surrounding._enabled
    assert results[0].dtype in (torch.float32, torch.float64)
    assert torch.equal(*results)


def test_layers_run_under_autocast_and_give_float32():
    vae = pv.mlp_vae((784,), latent_dim=2, hidden_dims=(16,))
    seen = []
    for part in vae.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    whole = pv.log_weights(vae, X, num_particles=2)
    assert set(seen) == {torch.float32}
    seen.clear()
    with autocast():
        half = pv.log_weights(vae, X, num_particles=2)
    assert set(seen) == {torch.bfloat16}
    assert whole.dtype == half.dtype == torch.float32
    seen.clear()
    pv.log_weights(vae, X, num_particles=2)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_under_autocast_trains_what_the_layers_see(compile):
    """Autocast's own cache would keep the first weights until the outermost context ends."""
    pyro.set_rng_seed(0)
    x = torch.bernoulli((torch.randn(200, 2) @ (20 * W)).sigmoid())
    vae = pv.mlp_vae((784,), latent_dim=2, hidden_dims=(16,))
    with autocast():
        history = pv.fit(vae, x, pv.ELBO(), epochs=20, lr=1e-2, batch_size=50, compile=compile, progress=False)
        inside = pv.log_likelihood(vae, x, 20, seed=0, progress=False).mean
    outside = pv.log_likelihood(vae, x, 20, seed=0, progress=False).mean
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0] + 50
    # Half precision rounds each logit by 2^-8 of its size, at random, and 784 derivatives are below 1.
    assert inside == pytest.approx(outside, abs=1.0)


@pytest.mark.slow
def test_compiled_code_is_of_the_autocast_that_surrounds_it():
    vae = pv.mlp_vae((784,), latent_dim=2, hidden_dims=(16,))
    step = pv.compile_step(vae, pv.ELBO(), torch.optim.SGD(vae.parameters(), 0.0))
    losses = []
    for half in (False, True, False, True):
        pyro.set_rng_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(float(step(X)))
    assert losses[0] == losses[2] != losses[1] == losses[3]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("where", ["prior", "decoder", "data", "all", "default"])
def test_programs_of_half_precision_are_computed_in_float32(dtype, where, request):
    """Against the exact evidence of the same rounded weights and data, in float64."""
    weights = W.to(dtype)
    x = (torch.randn(40, 2) @ W + torch.randn(40, 784)).to(dtype)
    covariance = torch.linalg.inv(torch.eye(2).double() + weights.double() @ weights.double().T)
    loc = x.double() @ weights.double().T @ covariance
    exact = dist.LowRankMultivariateNormal(
        torch.zeros(784).double(), weights.double().T, torch.ones(784).double()
    ).log_prob(x.double())
    if where == "default":
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(dtype)
    types = [dtype if where in ("all", part) else torch.float32 for part in ("prior", "decoder", "data")]
    zeros, decoder = torch.zeros(2, dtype=types[0]), weights.to(types[1])
    data = x.to(types[2]), loc.to(types[0]), (1.5 * covariance.diagonal().sqrt()).to(types[0]).expand(40, 2)

    def model(x, loc, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ decoder, 1.0).to_event(1), obs=x)

    def guide(x, loc, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    result = pv.log_likelihood(model, guide, data, 1000, seed=0, progress=False)
    assert result.per_datum.dtype == torch.float64
    # Float32 sums of 784 squares, each below 20 or so, are right to 784^(1/2) 2^-24 times their sum.
    assert abs(result.mean - exact.mean()) < 4 * result.monte_carlo_error + 0.01
    assert pv.log_weights(model, guide, *data, num_particles=2).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_networks_of_half_precision_are_trained_and_evaluated(dtype):
    """Layers compute in their own type, batch norm keeps its statistics, and sites are float32."""
    pyro.set_rng_seed(0)
    x = torch.randn(100, 2) @ torch.randn(2, 5)
    norm = torch.nn.BatchNorm1d(5)
    encoder, decoder = torch.nn.Sequential(norm, torch.nn.Linear(5, 4)).to(dtype), torch.nn.Linear(2, 5).to(dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], 1e-4)
    bounds = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = pv.ELBO(4).differentiable_loss(model, guide, x)
        loss.backward()
        assert {p.grad.dtype for p in (*encoder.parameters(), *decoder.parameters())} == {dtype}
        optimizer.step()
        bounds.append(-loss.item() / 100)
    # After sixty steps a tenth each, the statistics are those of x; half precision has steps of 2^-8.
    assert (norm.running_mean.float() - x.mean(0)).abs().max() < 0.02
    assert bounds[-1] > bounds[0] + 1
    encoder.eval()
    assert pv.log_weights(model, guide, x, num_particles=2).dtype == torch.float32


def test_a_sample_inside_a_layer_of_half_precision_is_refused_by_name():
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return pyro.sample("z", dist.Normal(super().forward(x), torch.ones(2).to(self.weight)).to_event(1))

    inside = torch.nn.Sequential(Noisy(5, 2)).bfloat16()

    def guide(x):
        with pyro.plate("data", len(x)):
            inside(x)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    with pytest.raises(
        ValueError, match=r"site 'z' is of half precision: expected draws and densities of float32.*\.float\(\)"
    ):
        pv.ELBO().loss(model, guide, torch.randn(6, 5))


@pytest.mark.parametrize("how", ["autocast", *HALF])
def test_what_a_pair_reports_is_float32(how):
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    if how != "autocast":
        vae.to(how)
    x = torch.randn(3, 5).to(next(vae.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        reported = [vae.embed(x), vae.reconstruct(x), vae.generate(4), vae.decode(torch.zeros(2, 2))]
    assert {each.dtype for each in reported} == {torch.float32}
