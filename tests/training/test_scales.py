"""Learned scales: each is where the bound has no slope, follows the residuals in fit, and stays put elsewhere."""

from __future__ import annotations

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from helpers.quick import slow_but
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training.scales import is_due

KINDS = {
    "learned": {"likelihood": "gaussian", "scale": "learned"},
    "per_column": {"likelihood": "gaussian", "scale": "per_column"},
    "student_t": {"likelihood": "student_t", "df": 4.0, "scale": "learned"},
    "student_t, per_column": {"likelihood": "student_t", "df": "learned", "scale": "per_column"},
    "low_rank": {"likelihood": "low_rank_gaussian", "rank": 2},
}
CLOSED = [kind for kind in KINDS if kind != "low_rank"]
kinds = pytest.mark.parametrize("kind", slow_but(["learned", "student_t, per_column", "low_rank"], KINDS))


def curves(n=640, d=16, noise=0.05):
    """Data near a surface, with little noise."""
    return (torch.randn(n, 2) @ torch.randn(2, d)).tanh() * 0.3 + noise * torch.randn(n, d)


def small_vae(seed=1, **options):
    pyro.set_rng_seed(seed)
    options = options or KINDS["learned"]
    return pv.mlp_vae((16,), latent_dim=2, hidden_dims=(32,), **options)


def without_latents(likelihood, factor=None):
    """A program whose likelihood is in no module that the program is, or is a method of."""

    def model(x, mask=None):
        pyro.module("its likelihood", likelihood)
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=1.0 if factor is None else factor):
            pyro.sample("pixels", likelihood(x[:, :1] * 0.3, mask=mask), obs=x)

    return model, lambda x, mask=None: None


def residual(vae, x):
    """The root mean square of x - mean(z) at samples of z."""
    with torch.no_grad():
        return (vae.decode(vae.posterior(x).sample((100,))) - x).square().mean().sqrt().item()


def sigma(vae):
    """The root mean square of the scales; for low rank, of the standard deviations."""
    likelihood = vae.likelihood
    if isinstance(likelihood, pv.LowRankGaussian):
        return likelihood(torch.zeros(1, 2)).variance.mean().sqrt().item()
    return (2 * likelihood.log_scale).exp().mean().sqrt().item()


def made(kind, size=5):
    name, options = KINDS[kind]["likelihood"], {k: v for k, v in KINDS[kind].items() if k != "likelihood"}
    family = pv.likelihoods.BY_NAME[name]
    return family(torch.nn.Linear(1, size), (size,), **options).double()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", CLOSED)
def test_the_bound_has_no_slope_in_a_scale_that_is_set(kind, masked, weighted):
    likelihood, x = made(kind), 7 * torch.randn(40, 5).double()
    mask = torch.rand(40, 5) < 0.7 if masked else None
    program = without_latents(likelihood, factor=torch.rand(40) + 0.1 if weighted else None)

    def slope():
        likelihood.zero_grad()
        # In Pyro's own loss each row has its own factor.
        pyro.infer.Trace_ELBO().loss_and_grads(*program, x, mask)
        return likelihood.log_scale.grad.abs().max()

    before = slope()
    pv.fit_scale(program, x, mask)
    # 20 rounds of EM reach a millionth of the slope; a mean needs one.
    assert slope() < before * (1e-12 if "student" not in kind else 1e-6)
    assert before > 1


def test_a_column_has_its_own_residual():
    autoencoder = pv.mlp_autoencoder((3, 2), latent_dim=2, hidden_dims=(4,), likelihood="gaussian", scale="per_column")
    x = torch.randn(50, 3, 2) * torch.tensor([[1.0, 1e3], [1e-3, 1.0], [2.0, 5.0]])
    pv.fit_scale(autoencoder, x)
    expected = (x - autoencoder.reconstruct(x)).square().mean(0).sqrt()
    torch.testing.assert_close(autoencoder.likelihood.log_scale.exp(), expected)


def test_a_constant_column_and_a_single_row_leave_the_scales_of_columns_alone():
    autoencoder = pv.mlp_autoencoder((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian", scale="per_column")
    log_scale = autoencoder.likelihood.log_scale
    x = torch.randn(50, 3)
    pv.fit_scale(autoencoder, x[:1])
    assert torch.equal(log_scale, torch.zeros(3))
    x[:, 1] = 7.0
    pv.fit_scale(autoencoder, x)
    assert log_scale[1] == 0
    assert bool((log_scale[[0, 2]] != 0).all())


def test_data_without_a_residual_leave_a_scale_alone():
    autoencoder = pv.mlp_autoencoder((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian", scale="learned")
    pv.fit_scale(autoencoder, autoencoder.decode(torch.zeros(1, 2)).expand(4, 3))
    assert torch.isfinite(autoencoder.likelihood.log_scale)
    with torch.no_grad():
        for parameter in autoencoder.likelihood.decoder.parameters():
            parameter.zero_()
        autoencoder.likelihood.log_scale.fill_(-2.0)
    pv.fit_scale(autoencoder, torch.zeros(4, 3))
    assert autoencoder.likelihood.log_scale == -2


@pytest.mark.parametrize("masked", [False, True])
def test_a_low_rank_covariance_gets_the_residuals_variances_and_keeps_its_correlations(masked):
    likelihood, x = made("low_rank"), 0.3 * torch.randn(40, 5).double()
    mask = torch.rand(40, 5) < 0.7 if masked else torch.ones(40, 5, dtype=torch.bool)

    def covariance():
        scale = torch.nn.functional.softplus(likelihood.raw_scale) + likelihood.min_scale
        return (likelihood.factor @ likelihood.factor.mT + scale.square().diag()).detach()

    before = covariance()
    pv.fit_scale(without_latents(likelihood), x, mask)
    with torch.no_grad():
        squares = torch.where(mask, x - likelihood(x[:, :1] * 0.3).mean, 0.0).square()
    torch.testing.assert_close(covariance().diag(), squares.sum(0) / mask.sum(0))

    def correlations(matrix):
        return matrix / (matrix.diag()[:, None] * matrix.diag()).sqrt()

    torch.testing.assert_close(correlations(covariance()), correlations(before))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"vectorize_particles": False}], ids=repr)
def test_iwae_weighs_its_particles(options):
    """The scale of all samples' residuals is well above the one at which the bound is highest."""
    x, vae = curves(), small_vae()
    pv.fit(vae, x, pv.IWAE(8), epochs=5, batch_size=64, seed=0, progress=False)
    log_scale, objective = vae.likelihood.log_scale, pv.IWAE(8, **options)
    pv.fit_scale(vae, x)
    of_all = log_scale.item()
    for _ in range(12):
        pv.fit_scale(vae, x, objective=objective)
    fitted = log_scale.item()
    assert fitted < of_all - 0.05

    def bound(change):
        with torch.no_grad():
            log_scale.fill_(fitted + change)
            pyro.set_rng_seed(3)
            return pv.IWAE(8).bound(vae, x).mean().item()

    # The bound's curvature in log sigma is about 2 for each of 16 elements, and its maximum moves by far less than
    # 0.05 between draws of 640 x 8 samples.
    assert bound(0.0) > max(bound(-0.1), bound(0.1), bound(of_all - fitted))


@kinds
def test_fit_brings_a_scale_to_the_residuals_within_some_hundred_steps(kind):
    x, vae = curves(), small_vae(**KINDS[kind])
    assert 0.9 < sigma(vae) < 1.1
    pv.fit(vae, x, pv.ELBO(), epochs=40, batch_size=64, seed=0, progress=False)
    # By its gradient alone, it would be at least exp(-0.4) = 0.67. A heavy tail has a smaller scale than its residual.
    assert (0.4 if "student" in kind else 0.9) < sigma(vae) / residual(vae, x) < 1.15
    assert residual(vae, x) < 0.25  # of data with a deviation of 1; other seeds have .09 to .15


@pytest.mark.slow
def test_each_kind_of_program_and_of_data():
    x, y = curves(n=320), torch.randint(3, (320,))
    mask = torch.rand_like(x) < 0.7
    learned = {"likelihood": "gaussian", "scale": "learned", "hidden_dims": (32,)}
    flat = {"latent_dim": 2, **learned}
    programs = {
        "mask": (pv.mlp_vae((16,), **flat), (torch.where(mask, x, 1e3), mask)),
        "loader": (pv.mlp_vae((16,), **flat), DataLoader(TensorDataset(x), batch_size=50, shuffle=True)),
        "float64": (pv.mlp_vae((16,), **flat).double(), x.double()),
        "conditional": (pv.mlp_conditional_vae((16,), label_dim=3, **flat), (x, y)),
        "semi-supervised": (pv.mlp_semi_supervised_vae((16,), num_classes=3, **flat), (x, y - 1)),
        "hierarchical": (pv.mlp_hierarchical_vae((16,), latent_dims=(4, 2), **learned), x),
        "autoencoder": (pv.mlp_autoencoder((16,), **flat), x),
    }
    for name, (pair, data) in programs.items():
        size = None if name == "loader" else 50
        objective = pv.ELBO(gradient="score") if name == "semi-supervised" else pv.ELBO()
        pv.fit(pair, data, objective, epochs=8, batch_size=size, seed=0, progress=False)
        # 56 steps by a gradient reach exp(-0.056) = 0.95; the data's own scale is 0.3.
        assert pair.likelihood.log_scale.exp() < 0.4, name


BRINGING = [pv.TVO(4), pv.PIWAE(2, 2), pv.ELBO(3)]


@pytest.mark.parametrize("objective", slow_but(BRINGING[-1:], BRINGING), ids=lambda o: o.family)
def test_each_bound_brings_the_scales_of_columns_to_the_noise(objective):
    x, vae = 0.1 * torch.randn(640, 16), small_vae(**KINDS["per_column"])
    pv.fit(vae, x, objective, epochs=20, batch_size=64, seed=0, progress=False)
    # A mean over a few minibatches of 64 rows has a relative error of about 0.05; the means still differ a little.
    assert vae.likelihood.log_scale.exp().min() > 0.07
    assert vae.likelihood.log_scale.exp().max() < 0.15


def test_a_jackknife_takes_the_weights_of_iwae():
    """Its own are partly negative, and a mean square with those is not one."""
    found = []
    for objective in (pv.JVI(4), pv.IWAE(4)):
        vae = small_vae()
        pyro.set_rng_seed(3)
        pv.fit_scale(vae, curves(), objective=objective)
        found.append(vae.likelihood.log_scale.item())
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_an_iwae_with_a_mask_and_a_scale_of_each_column():
    x, vae = curves(), small_vae(**KINDS["per_column"])
    mask = torch.rand_like(x) < 0.7
    pv.fit(vae, (x, mask), pv.IWAE(4), epochs=10, batch_size=64, seed=0, progress=False)
    assert vae.likelihood.log_scale.exp().max() < 0.5


@pytest.mark.parametrize("kind", ["per_column", "low_rank"])
def test_a_resumed_run_ends_where_an_unbroken_run_ends(tmp_path, kind):
    x, settings = curves(n=130), {"batch_size": 64, "seed": 0, "progress": False}  # the last minibatch has two rows
    whole, first, second = (small_vae(**KINDS[kind]) for _ in range(3))
    pv.fit(whole, x, pv.ELBO(), epochs=9, **settings)
    path = tmp_path / "checkpoint.pt"
    pv.fit(first, x, pv.ELBO(), epochs=4, checkpoint=path, **settings)
    pv.fit(second, x, pv.ELBO(), epochs=9, checkpoint=path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_second_fit_starts_where_the_first_ended(tmp_path):
    x, vae, path = curves(), small_vae(), tmp_path / "checkpoint.pt"
    pv.fit(vae, x, pv.ELBO(), epochs=15, batch_size=64, seed=0, progress=False, checkpoint=path)
    ended, again = sigma(vae), small_vae(seed=5)
    pv.load_parameters(path, again, x)
    assert sigma(again) == ended
    pv.fit(again, x, pv.ELBO(), epochs=1, batch_size=640, lr=1e-9, seed=1, progress=False)
    assert 0.7 < sigma(again) / ended < 1.2  # the residual still falls; a new start would be at 1


def test_evaluations_and_a_frozen_scale_stay():
    x, vae, alone = curves(n=64), small_vae(), small_vae()
    pv.fit(vae, x, pv.ELBO(), epochs=2, seed=0, progress=False, validation=2 * x)
    pv.fit(alone, x, pv.ELBO(), epochs=2, seed=0, progress=False)
    before = vae.likelihood.log_scale.item()
    assert before == alone.likelihood.log_scale.item()
    pv.ELBO().bound(vae, x)
    pv.compare(vae, x, pv.IWAE(3), repeats=2, seed=0)
    pv.IWAE(5).loss(vae, x)
    assert vae.likelihood.log_scale.item() == before
    vae.likelihood.log_scale.requires_grad_(False)
    pv.fit(vae.eval(), x, pv.ELBO(), epochs=2, seed=0, progress=False)
    assert vae.likelihood.log_scale.item() == before
    with pytest.raises(pv.PyroVAEError, match="a parameter that is not frozen, got none"):
        pv.fit_scale(vae, x)


def test_what_has_no_learned_scale_is_refused():
    with pytest.raises(pv.PyroVAEError, match=r"got none. Build it with scale='learned'"):
        pv.fit_scale(pv.mlp_vae((4,), latent_dim=2), torch.ones(3, 4))
    with pytest.raises(pv.PyroVAEError, match="got none"):
        pv.fit_scale(small_vae(likelihood="gaussian", scale="per_pixel"), torch.ones(3, 16))
    program = LinearGaussian(3, 2, 10)
    with pytest.raises(pv.PyroVAEError, match="got none"):
        pv.fit_scale(program.model, program.guide, program.x)


def test_a_likelihood_of_your_own_needs_no_mean():
    class Meanless(dist.Normal):
        mean = property(lambda self: 1 / 0)

    class Own(pv.Likelihood):
        def pixel_distribution(self, loc):
            return Meanless(loc, 1.0)

    vae = small_vae(likelihood=Own)
    assert len(pv.fit(vae, curves(n=20), pv.ELBO(), epochs=1, progress=False)) == 1


def test_nothing_else_notices():
    """Random numbers, batch norm, modes, gradients and the store's parameters stay as they are."""
    vae, x = small_vae(), curves(n=30)
    vae.posterior.encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
    vae.eval().posterior.train()
    statistics = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    others = {name: p.clone() for name, p in vae.named_parameters() if "log_scale" not in name}
    pyro.set_rng_seed(4)
    expected = torch.rand(3)
    pyro.set_rng_seed(4)
    for objective in (None, pv.IWAE(3)):
        before = vae.likelihood.log_scale.item()
        pv.fit_scale(vae, x, objective=objective)
        assert vae.likelihood.log_scale.item() != before
    assert torch.equal(torch.rand(3), expected)
    assert vae.posterior.training
    assert not vae.likelihood.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in vae.named_buffers())
    assert all(torch.equal(p, others[name]) for name, p in vae.named_parameters() if name in others)
    assert all(p.grad is None for p in vae.parameters())


def test_dropout_is_on_where_the_module_is_in_training_mode():
    """The scale fits the loss that is trained."""
    pair = pv.mlp_autoencoder((16,), latent_dim=4, hidden_dims=(32,), likelihood="gaussian", scale="learned")
    pair.likelihood.decoder = torch.nn.Sequential(pair.likelihood.decoder, torch.nn.Dropout(0.5))
    with torch.no_grad():
        pair.likelihood.decoder[0][-1].bias.fill_(1.0)
    x = 1.0 + 0.01 * torch.randn(200, 16)
    pv.fit_scale(pair, x)
    in_training = sigma(pair)
    pv.fit_scale(pair.eval(), x)
    assert sigma(pair) == pytest.approx((x - pair.reconstruct(x)).square().mean().sqrt().item(), rel=1e-4)
    # Half of the means are 0 and half are about 2, each 1 away from x.
    assert in_training > 0.9 > 1.5 * sigma(pair)


@pytest.mark.slow
def test_it_serves_svi_and_compiled_steps(without_inductor):
    x, vae = curves(), small_vae()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.ELBO())
    for number in range(60):
        if number % 10 == 0:
            pv.fit_scale(vae, x)
        svi.step(x)
    assert sigma(vae) < 0.4
    again = small_vae()
    step = pv.compile_step(again, pv.ELBO(), torch.optim.Adam(again.parameters(), lr=1e-3))
    step(x)
    pv.fit_scale(again, x)
    pyro.set_rng_seed(7)
    expected = pv.ELBO().loss(again, x)
    pyro.set_rng_seed(7)
    assert step(x).item() == pytest.approx(expected, rel=1e-4)  # the compiled step reads the new scale


def test_compiled_training_moves_scales_as_eager_training_does(without_inductor):
    x = curves(n=128)
    ends = []
    for compiled in (False, True):
        vae = small_vae(**KINDS["per_column"])
        pv.fit(vae, x, pv.ELBO(), epochs=5, batch_size=64, seed=0, compile=compiled, progress=False)
        ends.append(vae.likelihood.log_scale.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)
    assert ends[0].max() < -0.3


def test_updates_grow_rare():
    assert [number for number in range(40) if is_due(number)] == [*range(16), *range(16, 32, 2), 32, 36]
    assert sum(map(is_due, range(1001))) == 64


@pytest.mark.parametrize(
    "options", [{"likelihood": "gaussian", "scale": "per_pixel"}, {"likelihood": "low_rank_gaussian"}], ids=repr
)
def test_a_floor_above_the_data_is_announced(options):
    vae, x = small_vae(**options), 1e-3 * curves(n=100)
    with pytest.warns(UserWarning, match=r"min_scale=0.01, and data deviate .* by less at 16 of 16 elements") as caught:
        pv.fit(vae, x, pv.ELBO(), epochs=1, progress=False)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(small_vae(**options, min_scale=1e-5), x, pv.ELBO(), epochs=1, progress=False)


def test_a_floor_above_the_residuals_is_announced_at_the_end():
    """Constant elements, and those that rarely leave a constant, are what the floor is for."""
    vae = small_vae(likelihood="gaussian", scale="per_pixel")
    x = curves(n=128)
    x[:, 0] = 0.0
    x[:, 1] = torch.where(torch.arange(128) == 3, 0.05, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(vae, x, pv.ELBO(), epochs=2, progress=False)
    exact = pv.mlp_autoencoder((4,), latent_dim=4, hidden_dims=(), likelihood="gaussian", scale="per_pixel")
    with torch.no_grad():
        exact.encoder[-1].weight.copy_(torch.eye(4)), exact.encoder[-1].bias.zero_()
        weight, bias = exact.likelihood.decoder[-1].weight, exact.likelihood.decoder[-1].bias
        weight.zero_(), bias.zero_()
        weight[:4] = torch.eye(4)
    with pytest.warns(UserWarning, match="residuals are less at 4 of 4 elements"):
        pv.fit(exact, torch.randn(50, 4), pv.ELBO(), epochs=1, lr=1e-9, progress=False)


def test_a_likelihood_of_a_pyro_model_of_your_own():
    """It is found where it is called, under any name, and its data too."""
    likelihood = pv.Gaussian(torch.nn.Linear(1, 5), (5,), scale="learned")
    encoder = torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.Tanh())

    def model(x):
        pyro.module("own", likelihood)
        with pyro.plate("own rows", len(x)):
            z = pyro.sample("code", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("own data", likelihood(z), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("own rows", len(x)):
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = 20 * torch.randn(100, 5)
    pv.fit((model, guide), x, pv.ELBO(), epochs=3, batch_size=40, seed=0, progress=False)
    assert 15 < likelihood.log_scale.exp() < 30


def test_a_scheduler_may_begin_at_zero():
    """The closed form goes on as long as it does with the step size that the scheduler scales."""
    x = curves()

    def train(factor):
        vae = small_vae()
        warm_up = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor)
        pv.fit(vae, x, pv.ELBO(), epochs=3, lr=0.05, seed=0, lr_scheduler=warm_up)
        return vae

    vae = train(lambda epoch: float(epoch > 0))
    assert 0.5 < sigma(vae) / residual(vae, x) < 2
    still = train(lambda epoch: 0.0)
    assert sigma(still) == pytest.approx(residual(still, x), rel=0.1)
