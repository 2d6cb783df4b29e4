"""The model/guide pairs are ordinary Pyro: everything that Pyro has works on them, and agrees with ours."""

from __future__ import annotations

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

import pyro_vae as pv

LIKELIHOODS = {
    "bernoulli": {"likelihood": "bernoulli"},
    "gaussian, fixed": {"likelihood": "gaussian", "scale": 0.5},
    "gaussian, learned": {"likelihood": "gaussian", "scale": "learned"},
    "gaussian, per pixel": {"likelihood": "gaussian", "scale": "per_pixel"},
}
NETWORKS = {
    "vectors": lambda **kwargs: pv.mlp_vae((7,), latent_dim=3, hidden_dims=(8, 6), **kwargs),
    "images": lambda **kwargs: pv.mlp_vae((1, 6, 5), latent_dim=3, hidden_dims=(8,), **kwargs),
    "conv": lambda **kwargs: pv.conv_vae((2, 7, 6), latent_dim=3, channels=(4, 5), **kwargs),
}
networks = pytest.mark.parametrize("network", NETWORKS)
likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def build(network, likelihood="bernoulli"):
    vae = NETWORKS[network](**LIKELIHOODS[likelihood])
    x = torch.rand(10, *vae.event_shape)
    return vae, (x > 0.5).float() if likelihood == "bernoulli" else x


@networks
@likelihoods
def test_sites_plates_and_event_dimensions(network, likelihood):
    vae, x = build(network, likelihood)
    model, guide = poutine.trace(vae.model).get_trace(x), poutine.trace(vae.guide).get_trace(x)
    assert [n for n in model.stochastic_nodes if n != "data"] == ["z"]
    assert model.observation_nodes == ["x"]
    assert [n for n in guide.stochastic_nodes if n != "data"] == ["z"]
    for site in (model.nodes["z"], model.nodes["x"], guide.nodes["z"]):
        assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
        assert site["fn"].batch_shape == (10,)
    assert guide.nodes["z"]["fn"].event_shape == model.nodes["z"]["fn"].event_shape == (3,)
    assert guide.nodes["z"]["fn"].has_rsample
    assert model.nodes["x"]["fn"].event_shape == vae.event_shape


@networks
@likelihoods
@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        JitTrace_ELBO(ignore_jit_warnings=True),
        RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True),
        pv.ELBO(),
        pv.ELBO(3, "monte_carlo"),
        pv.IWAE(3),
        pv.IWAE(3, vectorize_particles=False),
    ],
    ids=lambda objective: repr(objective).split(" object")[0],
)
def test_svi_reaches_every_parameter(network, likelihood, objective):
    vae, x = build(network, likelihood)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=type(objective)(**_arguments(objective)))
    losses = [svi.step(x) for _ in range(2)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert all((before[name] != value).any() for name, value in vae.named_parameters())
    assert torch.isfinite(torch.tensor(svi.evaluate_loss(x)))


def _arguments(objective):
    """A new objective for each test: Pyro's keep what they compiled or guessed for the program before."""
    arguments = {"num_particles": objective.num_particles, "vectorize_particles": objective.vectorize_particles}
    if isinstance(objective, pv.ELBO):
        arguments["kl"] = objective.kl
    if isinstance(objective, JitTrace_ELBO):
        arguments["ignore_jit_warnings"] = True
    return arguments | ({"alpha": 0} if isinstance(objective, RenyiELBO) else {})


@networks
@likelihoods
@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_same_seed_same_value_as_pyro(network, likelihood, num_particles):
    vae, x = build(network, likelihood)
    vectorised = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    cases = [
        (pv.ELBO(num_particles, "monte_carlo"), Trace_ELBO(**vectorised)),
        (pv.ELBO(num_particles), TraceMeanField_ELBO(**vectorised)),
    ]
    if num_particles > 1:  # Pyro's refuses one particle
        cases.append((pv.IWAE(num_particles), RenyiELBO(alpha=0, **vectorised)))
    for ours, pyros in cases:
        values, gradients = [], []
        for objective in (ours, pyros):
            vae.zero_grad()
            pyro.set_rng_seed(7)
            values.append(objective.loss(vae.model, vae.guide, x))
            pyro.set_rng_seed(7)
            objective.loss_and_grads(vae.model, vae.guide, x)
            gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_torch_optimiser_on_the_objective_as_a_module():
    vae, x = build("vectors", "gaussian, fixed")
    loss = pv.IWAE(4)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        values.append(loss(x))
        values[-1].backward()
        optimizer.step()
    assert sum(values[-10:]) < sum(values[:10])


@networks
def test_predictive_and_handlers(network):
    vae, x = build(network)
    from_prior = Predictive(poutine.uncondition(vae.model), num_samples=6)(x)
    assert from_prior["x"].shape == (6, 10, *vae.event_shape)
    posterior = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=6, parallel=True)(x)
    assert posterior["z"].shape == (6, 10, 3)
    assert posterior["x"].shape == (6, 10, *vae.event_shape)
    z = torch.randn(10, 3)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + vae.likelihood(z).log_prob(x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@networks
@pytest.mark.parametrize(
    "objective", [pv.ELBO(2), pv.IWAE(3), Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda o: type(o).__name__
)
def test_a_subsampled_plate_scales_to_all_data(network, objective):
    vae, x = build(network, "gaussian, fixed")
    with torch.no_grad():
        full = torch.tensor([objective.loss(vae.model, vae.guide, x) for _ in range(100)])
        part = torch.tensor([objective.loss(vae.model, vae.guide, x, subsample_size=4) for _ in range(300)])
    assert z_score(part, full.mean()) < 4
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    svi.step(x, subsample_size=4)


def test_two_vaes_in_one_process_each_learn():
    """Under pyro.module alone, the second would share the first one's entries and never move."""
    for _ in range(2):
        vae, x = build("vectors")
        before = [p.detach().clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=pv.ELBO()).step(x)
        assert all((b != p).any() for b, p in zip(before, vae.parameters(), strict=True))
        stored = pyro.get_param_store()
        assert stored["likelihood$$$decoder.1.weight"] is vae.likelihood.decoder[1].weight


@networks
def test_embed_decode_reconstruct_generate(network):
    vae, x = build(network)
    z = vae.embed(x)
    torch.testing.assert_close(z, vae.posterior(x).mean)
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood(z).mean)
    assert not vae.reconstruct(x).requires_grad
    assert vae.decode(torch.randn(4, 5, 3)).shape == (4, 5, *vae.event_shape)
    generated = vae.generate(8)
    assert generated.shape == (8, *vae.event_shape)
    assert ((generated > 0) & (generated < 1)).all()


def test_conv_decoder_gives_each_particle_its_own_image():
    vae, _ = build("conv")
    z = torch.randn(4, 3, 3)
    one_by_one = torch.stack([vae.decode(row) for row in z])
    torch.testing.assert_close(vae.decode(z), one_by_one)


def test_gaussian_scales():
    for scale, expected in ((0.25, 0.25), ("learned", 1.0)):
        vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale=scale)
        torch.testing.assert_close(vae.likelihood(torch.randn(3, 2)).stddev, torch.full((3, 4), expected))
    per_pixel = pv.conv_vae((3, 8, 8), latent_dim=2, likelihood="gaussian", scale="per_pixel")
    z = torch.randn(5, 2)
    features = per_pixel.likelihood.decoder(z)
    fitted = per_pixel.likelihood(z)
    torch.testing.assert_close(fitted.mean, features[:, :3])
    torch.testing.assert_close(fitted.stddev, torch.nn.functional.softplus(features[:, 3:]) + 0.01)
    assert fitted.stddev.flatten().unique().numel() > 100


def test_moves_to_float64_whole():
    vae, x = build("images")
    vae.double()
    assert pv.ELBO().bound(vae.model, vae.guide, x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(10, 28),
            r"expected x of shape \(N, 7\), got \(10, 28\). Build the VAE with the event_shape of your",
        ),
        (torch.zeros(10, 1, 7), r"expected x of shape \(N, 7\), got \(10, 1, 7\). Reshape it: x.reshape\(-1, 7\)"),
        (torch.zeros(7), r"expected x of shape \(N, 7\), got \(7,\). For one datum, pass x\[None\]"),
        (
            torch.zeros(10, 7, dtype=torch.float64),
            r"expected x of torch.float32, as the networks are, got torch.float64",
        ),
        (torch.zeros(10, 7).numpy(), r"expected x to be a tensor, got ndarray"),
        (torch.zeros(10, 7, dtype=torch.uint8), r"expected x of floating point, got torch.uint8. Convert it"),
        (torch.full((10, 7), 0.5), r"Bernoulli likelihood expected x of zeros and ones, got values from 0.5 to 0.5"),
    ],
)
def test_bad_data(x, message):
    vae, _ = build("vectors")
    for call in (
        lambda: vae.model(x),
        lambda: vae.guide(x),
        lambda: pv.ELBO().loss(vae.model, vae.guide, x),
        lambda: pv.IWAE(3).loss(vae.model, vae.guide, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pv.mlp_vae((4,), latent_dim=0), r"expected latent_dim of positive integers, got \[0\]"),
        (lambda: pv.mlp_vae((4, -1), latent_dim=2), r"expected event_shape of positive integers"),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="bernouli"),
            r"one of 'bernoulli', 'gaussian'.*, got 'bernouli'",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, scale="learned"),
            r"an option of Bernoulli \(it has no options\), got scale='learned'",
        ),
        (lambda: pv.mlp_vae(5, latent_dim=2), r"expected event_shape of positive integers, got 5"),
        (lambda: pv.mlp_vae((), latent_dim=2), r"expected event_shape of positive integers, got \(\)"),
        (lambda: pv.mlp_vae((4,), latent_dim=2, hidden_dims=20), r"expected hidden_dims of positive integers, got 20"),
        (lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale=0), r"positive number, 'learned'"),
        (lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale="fixed"), r"got 'fixed'"),
        (lambda: pv.conv_vae((28, 28), latent_dim=2), r"expected an event_shape \(C, H, W\).*use mlp_vae"),
        (lambda: pv.conv_vae((1, 28, 28), latent_dim=2, channels=()), r"at least one entry in channels"),
    ],
)
def test_bad_architecture(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_decoder_with_the_wrong_number_of_outputs():
    likelihood = pv.Gaussian(torch.nn.Linear(2, 4), (4,), scale="per_pixel")
    with pytest.raises(ValueError, match=r"expected a decoder with 8 outputs a datum \(2 for each element of \(4,\)\)"):
        likelihood(torch.randn(5, 2))


def test_labels_passed_along_with_the_data():
    vae, x = build("vectors")
    with pytest.raises(
        ValueError, match=r"mask to be booleans of x's shape \(10, 7\).*got torch.int64 of shape \(10,\).*labels"
    ):
        pv.fit(vae.model, vae.guide, (x, torch.arange(10)), pv.ELBO(), epochs=1)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_impute_is_the_posterior_mean_or_mode(likelihood):
    options = {"categories": 3} if likelihood == "categorical" else {}
    vae = pv.mlp_vae((4,), latent_dim=1, hidden_dims=(8,), likelihood=likelihood, **options).double()
    vae.likelihood.decoder[-1].weight.data *= 2
    x = torch.randint(3, (6, 4)).double()
    mask = torch.rand(6, 4) > 0.5
    found = torch.stack([vae.impute(x.where(mask, torch.nan), mask, 3000) for _ in range(20)])  # several portions each
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid[..., 0]) + vae.likelihood(grid, mask=mask).log_prob(x)
    statistic = vae.likelihood.statistic(vae.likelihood(grid))
    weights = log_joint.softmax(0).reshape(4001, 6, *[1] * (statistic.dim() - 2))
    exact = vae.likelihood.from_statistic((weights * statistic).sum(0))
    assert torch.equal(found[0][mask], x[mask])
    if likelihood == "categorical":
        assert (found == exact.where(~mask, x)).double().mean() > 0.97
    else:
        assert z_score(found, exact)[~mask].max() < 4
        assert (found.mean(0) - exact)[~mask].abs().max() < 0.1


def test_looking_at_a_trained_pair_changes_nothing_of_it():
    encoder = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 4)
    )
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    vae = pv.VAE(
        prior=pv.StandardNormal(2), likelihood=pv.Gaussian(decoder, (4,)), posterior=pv.DiagonalNormal(encoder, (4,))
    )
    x = torch.randn(10, 4)
    pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=2, batch_size=5)
    assert vae.training
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.testing.assert_close(vae.reconstruct(x)[:1], vae.reconstruct(x[:1]))  # one row, and no dropout
    vae.generate(5), vae.impute(x, torch.rand(10, 4) > 0.5, 10)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert vae.training


class _Eventful(pv.Likelihood):
    def pixel_distribution(self, loc):
        return dist.Normal(loc, 1.0).to_event(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.Bernoulli(torch.nn.Linear, (4,)), r"decoder to be a torch.nn.Module, got <class"),
        (
            lambda: pv.Bernoulli(torch.nn.Linear(2, 4), 4),
            r"event_shape to be the shape of one datum, got 4. Write \(4,\)",
        ),
        (
            lambda: _Eventful(torch.nn.Linear(2, 4), (4,))(torch.zeros(5, 2)),
            r"batch shape \(5, 4\) and no event.*Drop to_event",
        ),
        (
            lambda: pv.VAE(prior=pv.StandardNormal(2), likelihood=pv.Bernoulli, posterior=pv.Unconditional(2, (4,))),
            r"likelihood to be a pv.Likelihood, got <class",
        ),
        (
            lambda: pv.VAE(
                prior=pv.StandardNormal(2),
                likelihood=pv.Bernoulli(torch.nn.Linear(2, 4), (4,)),
                posterior=pv.Unconditional(2, (3,)),
            ),
            r"posterior of the likelihood's event_shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_and_missing_values_as_pandas_has_them():
    vae = pv.mlp_vae((2,), latent_dim=2, hidden_dims=(8,), likelihood="poisson")
    table = pd.DataFrame({"a": [1, 2, 0, 4], "b": [1, 0, 3, 5]})
    for use in (vae.reconstruct, lambda x: pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=1)):
        with pytest.raises(ValueError, match=r"torch.tensor\(x.to_numpy\(\), dtype=torch.float32\)"):
            use(table)
    x = torch.tensor(table.to_numpy(), dtype=torch.float32)
    x[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"pass \(x.nan_to_num\(\), ~x.isnan\(\)\)"):
        pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=1)
    with pytest.raises(ValueError, match=r"got nan. Where a value is missing, pass a mask"):
        pv.ELBO().bound(vae.model, vae.guide, x)
    pv.fit(vae.model, vae.guide, (x.nan_to_num(), ~x.isnan()), pv.ELBO(), epochs=1)
    assert vae.impute(x, ~x.isnan(), 10).isfinite().all()


def test_missing_elements_are_filled_in_given_correlated_ones():
    vae = pv.mlp_vae((4,), latent_dim=1, hidden_dims=(8,), likelihood="low_rank_gaussian", rank=2).double()
    with torch.no_grad():
        vae.likelihood.factor.normal_()
        vae.likelihood.decoder[-1].weight.zero_()  # z says nothing, so that one sample is as good as many
    x, mask = torch.randn(5, 4).double(), torch.tensor([[True, False, True, False]] * 5)
    loc, factor = vae.decode(torch.zeros(1, 1).double())[0], vae.likelihood.factor.detach()
    scale = torch.nn.functional.softplus(vae.likelihood.raw_scale.detach()) + vae.likelihood.min_scale
    covariance = factor @ factor.T + scale.square().diag()
    on, off = [0, 2], [1, 3]
    gain = covariance[off][:, on] @ torch.linalg.inv(covariance[on][:, on])
    torch.testing.assert_close(vae.impute(x, mask, 3)[:, off], loc[off] + (x[:, on] - loc[on]) @ gain.T)


def test_no_filling_in_where_all_weights_are_zero():
    class Uniform(pv.Likelihood):
        filler = 0.5

        def pixel_distribution(self, loc):
            return dist.Uniform(loc, loc + 1e-6, validate_args=False)

    vae = pv.mlp_vae((2,), latent_dim=1, hidden_dims=(4,), likelihood=Uniform)
    with pytest.raises(ValueError, match="all 10 importance weights are zero at 3 data"):
        vae.impute(torch.full((3, 2), 9.0), torch.tensor([[True, False]] * 3), 10)


def test_missing_elements_where_zero_is_no_value():
    class LogNormal(pv.Likelihood):
        filler = 1.0

        def pixel_distribution(self, loc):
            return dist.LogNormal(loc, 1.0)

    vae = pv.mlp_vae((2,), latent_dim=1, hidden_dims=(4,), likelihood=LogNormal)
    x, mask = torch.rand(6, 2).exp(), torch.rand(6, 2) > 0.4
    pv.ELBO().loss_and_grads(vae.model, vae.guide, x, mask)
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    full = pv.ELBO(kl="monte_carlo")
    pyro.set_rng_seed(0)
    one = full.bound(vae.model, vae.guide, x, mask)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(one, full.bound(vae.model, vae.guide, x.where(mask, 7.0), mask))


def test_a_frozen_part_stays_frozen_beside_an_earlier_pair():
    x = torch.randn(10, 3)
    first, second = (pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian") for _ in range(2))
    pv.fit(first.model, first.guide, x, pv.ELBO(), epochs=1)
    second.likelihood.requires_grad_(False)
    before = [parameter.clone() for parameter in second.likelihood.parameters()]
    pv.fit(second.model, second.guide, x, pv.ELBO(), epochs=2)
    assert all(map(torch.equal, before, second.likelihood.parameters()))
    assert not any(parameter.requires_grad for parameter in second.likelihood.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, posterior="full"),
            r"posterior to be a subclass of pv.Posterior.*got 'full'",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, posterior=pv.Unconditional(2, (4,))),
            r"Assign any other module afterwards: vae.posterior =",
        ),
        (lambda: pv.mlp_vae((4,), latent_dim=2, prior=pv.MixturePrior), r"prior to be a torch.nn.Module, got <class"),
        (
            lambda: setattr(pv.mlp_vae((4,), latent_dim=2), "prior", dist.Normal(0, 1)),
            r"prior to be a torch.nn.Module, got Normal",
        ),
        (
            lambda: pv.VampPrior(pv.Unconditional(2, (4,)), torch.ones(3, 4, dtype=torch.long)),
            r"floating point, got torch.int64",
        ),
        (lambda: pv.FlowPrior(100, hidden_dims=(64,)), r"no narrower than the latent, 100, got hidden_dims=\(64,\)"),
        (
            lambda: pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3).generate(3),
            r"expected y to be a tensor.*got int",
        ),
        (
            lambda: pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3).generate(torch.zeros(2, 1)),
            r"expected y of torch.float32 and shape \(2, 3\), got torch.float32 of shape \(2, 1\)",
        ),
        (
            lambda: pv.mlp_semi_supervised_vae((4,), latent_dim=2, num_classes=3).generate(torch.tensor([7])),
            r"labels from 0 to 2, got 7 to 7",
        ),
    ],
)
def test_natural_mistakes(make, message):
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        make()


def test_labels_of_any_integer_type_and_particles_to_decode():
    vae = pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3)
    y = torch.tensor([0, 1, 2])
    z = torch.randn(5, 3, 2)
    assert torch.equal(vae.decode(z, y.to(torch.uint8)), vae.decode(z, y))
    torch.testing.assert_close(vae.decode(z, y)[4], vae.decode(z[4], y))


def test_two_pairs_in_one_program_are_refused():
    pairs = [pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,)) for _ in range(2)]
    scoped = [[scope(program, prefix=str(i)) for program in (p.model, p.guide)] for i, p in enumerate(pairs)]
    x = torch.rand(5, 3).round()
    svi = SVI(
        lambda x: [model(x) for model, _ in scoped],
        lambda x: [guide(x) for _, guide in scoped],
        pyro.optim.Adam({"lr": 1e-3}),
        loss=Trace_ELBO(),
    )
    with pytest.raises(ValueError, match="two pairs in one program have parameters of one name"):
        svi.step(x)
