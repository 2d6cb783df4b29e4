"""pv.to_arviz: what the groups hold, against exact moments; and that ArviZ's own functions take them."""

from __future__ import annotations

import math
import warnings
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.programs import LinearGaussian
from helpers.toys import IMPROPER

import pyro_vae as pv

GROUPS = {
    "posterior",
    "prior",
    "posterior_predictive",
    "prior_predictive",
    "log_likelihood",
    "sample_stats",
    "observed_data",
}
ARVIZ_1 = int(version("arviz").split(".")[0]) > 0
arviz_warnings = pytest.mark.filterwarnings("ignore::FutureWarning:arviz", "ignore::UserWarning")


def datasets(groups):
    """The groups as xarray data sets, from either kind of container."""
    names = groups.children if ARVIZ_1 else groups.groups()
    return {name: groups[name].to_dataset() if ARVIZ_1 else groups[name] for name in names}


@pytest.fixture(scope="module")
def program():
    return LinearGaussian(3, 2, 4, wrong=True)


@pytest.fixture(scope="module")
def groups(program):
    pyro.set_rng_seed(0)
    return pv.to_arviz(program, program.x, 4000)


@arviz_warnings
@pytest.mark.parametrize("name", ["latent", "data", "height", "z_dim_0"])
def test_sites_named_as_dimensions(name):
    def model(x):
        with pyro.plate("plate", len(x)):
            z = pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z[..., None, None, :], 1.0).to_event(3), obs=x[:, None, None])

    def guide(x):
        with pyro.plate("plate", len(x)):
            pyro.sample(name, dist.Normal(x / 2, 0.7).to_event(1))

    found = datasets(pv.to_arviz((model, guide), torch.randn(5, 2), num_samples=10))
    assert found.keys() == GROUPS
    dims = {"chain": "chain", "draw": "draw", "data": "data", "latent": "latent"} | {name: f"{name}_dim"}
    sizes = dict(zip((dims[d] for d in ("chain", "draw", "data", "latent")), (1, 10, 5, 2), strict=True))
    assert dict(found["posterior"][name].sizes) == sizes
    assert "height_dim" in found["observed_data"]["obs"].dims or name != "height"


@arviz_warnings
@pytest.mark.parametrize(("name", "plate", "dim"), [("draw", "chain", "chain_plate"), ("z", "latent", "latent")])
def test_sites_and_plates_named_as_the_dimensions_that_arviz_needs(name, plate, dim):
    """They get other names, and the draws of a program with names of its own."""

    def program(site, plate):
        def model(x):
            with pyro.plate("rows", len(x), dim=-2), pyro.plate(plate, 3, dim=-1):
                z = pyro.sample(site, dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(x):
            with pyro.plate("rows", len(x), dim=-2), pyro.plate(plate, 3, dim=-1):
                pyro.sample(site, dist.Normal(torch.stack([x, x], -1), 0.7).to_event(1))

        return model, guide

    x = torch.randn(5, 3)
    found, plain = (datasets(pv.to_arviz(program(*names), x, 10, seed=0)) for names in ((name, plate), ("a", "pixels")))
    own = "draw_site" if name == "draw" else name
    assert found["posterior"][own].dims[:4] == ("chain", "draw", "data", dim)
    for group in ("posterior", "prior"):
        np.testing.assert_array_equal(found[group][own], plain[group]["a"])
    np.testing.assert_array_equal(found["posterior_predictive"]["x"], plain["posterior_predictive"]["x"])


@arviz_warnings
def test_groups_and_dimensions(groups):
    found = datasets(groups)
    assert found.keys() == GROUPS
    assert type(groups).__name__ == ("DataTree" if ARVIZ_1 else "InferenceData")
    draws = {"chain": 1, "draw": 4000, "data": 4}
    for group in ("posterior", "prior"):
        assert dict(found[group]["z"].sizes) == draws | {"latent": 2}
    for group in ("posterior_predictive", "prior_predictive"):
        assert dict(found[group]["x"].sizes) == draws | {"x_dim_0": 3}
    assert dict(found["log_likelihood"]["x"].sizes) == draws
    assert {name: dict(v.sizes) for name, v in found["sample_stats"].items()} == {"log_weight": draws, "lp": draws}
    assert dict(found["observed_data"]["x"].sizes) == {"data": 4, "x_dim_0": 3}
    for dataset in found.values():
        assert set(dataset.coords) == set(dataset.sizes)
        assert dataset.attrs["inference_library"] == "pyro_vae"


@arviz_warnings
def test_values_are_those_of_the_distributions(groups, program):
    found = datasets(groups)
    z = found["posterior"]["z"].values[0]
    loc = (program.x @ program.A.T + program.c).numpy()
    covariance = (program.L.tril() @ program.L.tril().T).numpy()
    error = np.sqrt(covariance.diagonal() / 4000)
    assert (np.abs(z.mean(0) - loc) < 4 * error).all()
    np.testing.assert_allclose(np.cov(z[:, 0].T), covariance, atol=0.1 * covariance.max())
    prior = found["prior"]["z"].values[0]
    assert (np.abs(prior.mean(0)) < 4 / math.sqrt(4000)).all()
    np.testing.assert_allclose(prior.var(0), 1, atol=4 * math.sqrt(2 / 4000))
    np.testing.assert_array_equal(found["observed_data"]["x"].values, program.x.numpy())
    # densities at the draws that stand beside them
    draws = torch.from_numpy(z)
    likelihood = dist.Normal(draws @ program.W.T + program.b, program.sigma).log_prob(program.x).sum(-1)
    np.testing.assert_allclose(found["log_likelihood"]["x"].values[0], likelihood.numpy())
    joint = likelihood + program.prior.log_prob(draws)
    q = dist.MultivariateNormal(torch.from_numpy(loc), scale_tril=program.L.tril()).log_prob(draws)
    np.testing.assert_allclose(found["sample_stats"]["lp"].values[0], joint.numpy())
    np.testing.assert_allclose(found["sample_stats"]["log_weight"].values[0], (joint - q).numpy())
    W, b = program.W.numpy(), program.b.numpy()
    for group, mean, spread in (
        ("posterior_predictive", loc @ W.T + b, covariance),
        ("prior_predictive", b, np.eye(2)),
    ):
        x = found[group]["x"].values[0]
        deviation = np.sqrt((W @ spread @ W.T).diagonal() + program.sigma**2)
        assert (np.abs(x.mean(0) - mean) < 4 * deviation / math.sqrt(4000)).all()
        np.testing.assert_allclose(x.std(0), np.broadcast_to(deviation, (4, 3)), rtol=4 / math.sqrt(2 * 4000))


@arviz_warnings
def test_saved_and_read_back_equal(groups, tmp_path):
    import arviz

    groups.to_netcdf(tmp_path / "groups.nc")
    again = datasets(arviz.from_netcdf(tmp_path / "groups.nc"))
    for name, dataset in datasets(groups).items():
        xr.testing.assert_identical(again[name], dataset)


@arviz_warnings
def test_arviz_works_on_it(groups):
    import arviz
    import matplotlib.pyplot as plt

    elpd = arviz.loo(groups)
    assert math.isfinite(elpd.elpd if ARVIZ_1 else elpd.elpd_loo)
    assert len(arviz.summary(groups, var_names=["z"])) == 8
    if ARVIZ_1:
        arviz.plot_dist(groups, var_names=["z"], backend="matplotlib")
        arviz.plot_ppc_dist(groups, num_samples=20, backend="matplotlib")
    else:
        arviz.plot_posterior(groups, var_names=["z"])
        arviz.plot_ppc(groups, num_pp_samples=20)
    plt.close("all")


@arviz_warnings
def test_images_have_named_dimensions_and_coordinates():
    vae = pv.mlp_vae((1, 4, 6), latent_dim=3, hidden_dims=(8,))
    x = (torch.rand(5, 1, 4, 6) > 0.5).float()
    names = [f"z{i}" for i in range(3)]
    found = datasets(pv.to_arviz(vae, x, 70, coords={"latent": names, "data": list("abcde")}, seed=0))
    assert dict(found["posterior_predictive"]["x"].sizes) == {
        "chain": 1, "draw": 70, "data": 5, "channel": 1, "height": 4, "width": 6,
    }  # fmt: skip
    assert found["posterior"]["latent"].values.tolist() == names
    assert found["observed_data"]["data"].values.tolist() == list("abcde")
    assert set(np.unique(found["posterior_predictive"]["x"])) == {0.0, 1.0}
    again = datasets(pv.to_arviz(vae, x, 70, seed=0))
    np.testing.assert_array_equal(again["posterior"]["z"], found["posterior"]["z"])


@arviz_warnings
def test_several_sites_and_nested_plates():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.factor("nothing", 0.0 * a)
            with pyro.plate("pixels", 3):
                pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.mean(1), 1.0))
            pyro.sample("b", dist.Normal(x[:, :2], 1.0).to_event(1))

    x = torch.randn(4, 3, dtype=torch.float64)
    found = datasets(pv.to_arviz(SimpleNamespace(model=model, guide=guide), x, 65))
    assert found.keys() == GROUPS
    draws = {"chain": 1, "draw": 65, "data": 4}
    assert dict(found["posterior"]["a"].sizes) == draws
    assert dict(found["posterior"]["b"].sizes) == draws | {"b_dim_0": 2}
    assert dict(found["prior_predictive"]["x"].sizes) == draws | {"pixels": 3}
    np.testing.assert_array_equal(found["observed_data"]["x"].values, x.numpy())
    z = torch.from_numpy(found["posterior"]["a"].values[0] + found["posterior"]["b"].values[0].sum(-1))
    likelihood = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(found["log_likelihood"]["x"].values[0], likelihood.numpy())


def test_draws_of_an_event_that_broadcasts_to_its_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1).mask(True), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1), 0.5))

    found = datasets(pv.to_arviz((model, guide), torch.zeros(1, 3), 2000, seed=0))
    x = found["prior_predictive"]["x"].values[0, :, 0]
    # Of covariances 1, and variances 2, whose estimates have the variances (1 + 2 * 2) / n and 8 / n.
    np.testing.assert_allclose(np.cov(x.T), 1 + np.eye(3), atol=4 * math.sqrt(8 / 2000))


def test_a_model_that_reads_what_it_observes():
    """Teacher forcing: the draw of the second column would be given the data's first, not the draw's."""

    def model(x, past):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(2):
                pyro.sample(f"x{t}", dist.Normal(z + past[:, t], 0.1), obs=x[:, t])

    def guide(x, past=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 0.1))

    def shifted(x):
        return torch.nn.functional.pad(x, (1, 0))[:, :-1]

    x = 10 + torch.randn(5, 2)
    with pytest.warns(UserWarning, match=r"model site 'x1' reads data that the model observes"):
        found = datasets(pv.to_arviz((lambda x: model(x, shifted(x)), guide), x, 10))
    assert found.keys() == GROUPS - {"posterior_predictive", "prior_predictive"}

    def scaled(x):
        model((x - 5) / 2, shifted((x - 5) / 2))

    def centred(x, weights, lengths):
        assert (lengths.diff() <= 0).all()
        model((x - 5) * weights[:, None] / 2, torch.zeros_like(x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = torch.ones(5), torch.arange(5, 0, -1)
        found = datasets(pv.to_arviz((centred, lambda x, *_: guide(x)), (x, *others), 10))
    assert found.keys() == GROUPS

    for data in (x, torch.full((5, 2), 10.0)):  # data of one value do not show whether they are read
        with pytest.warns(UserWarning, match=r"model site 'x[01]' reads data that the model observes"):
            found = datasets(pv.to_arviz((scaled, guide), data, 10))
        assert found.keys() == GROUPS - {"posterior_predictive", "prior_predictive"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = datasets(pv.to_arviz((lambda x: model((x - 5) / 2, torch.zeros_like(x)), guide), x, 10))
    assert found.keys() == GROUPS
    given = datasets(pv.to_arviz((model, guide), (x, shifted(x)), 400, seed=0))
    mean = given["prior_predictive"]["x1"].values[0].mean(0)
    np.testing.assert_allclose(mean, x[:, 0], atol=4 * math.sqrt(1.01 / 400))


def test_an_improper_prior_has_no_draws():
    found = datasets(pv.to_arviz(IMPROPER, torch.randn(5), 10))
    assert found.keys() == GROUPS - {"prior", "prior_predictive"}
    assert abs(found["sample_stats"]["log_weight"]).max() < 1e-6  # p(x) is 1, and the guide is the posterior


def test_refusals(program):
    for settings, match in (
        ({"num_samples": 1}, "num_samples to be an integer, at least 2, got 1"),
        ({"coords": {"letter": ["a"]}}, "coords of dimensions .* got 1 values of 'letter'"),
        ({"coords": {"latent": ["a"]}}, "got 1 values of 'latent'"),
    ):
        with pytest.raises(ValueError, match=match):
            pv.to_arviz(program, program.x, **{"num_samples": 5} | settings)
    with pytest.raises(
        ValueError, match=r"expected a model and a guide, or one thing that has both, .*got the function model alone"
    ):
        pv.to_arviz(program.model.__func__, program.x)
    with pytest.raises(ValueError, match="x to be finite"):
        pv.to_arviz(program, torch.full((2, 3), math.nan, dtype=torch.float64))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_reparameterised_site_is_drawn_and_not_observed(vectorize):
    def base(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.ones(len(x)), 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal((x - 1) * 2 / 5, 5**-0.5))

    model = pyro.poutine.reparam(base, {"z": pyro.infer.reparam.LocScaleReparam(0.0)})
    x = torch.tensor([3.0, -3.0, 0.0])
    groups = pv.to_arviz(model, guide, x, 50, seed=0, vectorize_particles=vectorize)
    assert list(groups["observed_data"].data_vars) == list(groups["log_likelihood"].data_vars) == ["x"]
    assert list(groups["posterior_predictive"].data_vars) == ["x"]
    for group in ("posterior", "prior"):
        torch.testing.assert_close(
            torch.tensor(groups[group]["z"].values), 1 + 2 * torch.tensor(groups[group]["z_decentered"].values)
        )
    if not vectorize:
        return
    sandwich = pv.bdmc(model, guide, x.repeat(50), 20, 8, seed=0, progress=False)
    ratio = (dist.Normal(1.0, 5**0.5).log_prob(sandwich.x) - sandwich.upper_per_datum).exp()  # unbiased for 1
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize(("vectorize", "number"), [(True, 20), (True, 3), (False, 3)])
def test_deterministic_sites_are_those_of_their_draws(vectorize, number):
    """Pyro takes the rows and particles of a value for an event; one outside the plate belongs to no datum."""

    def model(x):
        pyro.deterministic("number", torch.tensor(3.0))
        with pyro.plate("classes", 4):
            pyro.deterministic("means", torch.zeros(4))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5, 2.0))
            pyro.deterministic("rate", z.exp())
            pyro.deterministic("pair", torch.stack([z, 2 * z], -1))
            pyro.deterministic("own", torch.stack([x, -x], -1))
            pyro.deterministic("column", x[:, None])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 + 0.8 * x, 0.8**0.5))

    x = torch.tensor([3.0, -3.0, 0.0])
    groups = datasets(pv.to_arviz(model, guide, x, number, seed=0, vectorize_particles=vectorize))
    for group in ("posterior", "prior"):
        assert list(groups[group].data_vars) == ["z", "rate", "pair", "own", "column"]
        z, rate, pair, own, column = (torch.tensor(each.values) for each in groups[group].data_vars.values())
        torch.testing.assert_close(rate, z.exp())
        torch.testing.assert_close(pair, torch.stack([z, 2 * z], -1))
        torch.testing.assert_close(own, torch.stack([x, -x], -1).expand(1, number, 3, 2))
        torch.testing.assert_close(column, x[:, None].expand(1, number, 3, 1))
    log_weights = torch.tensor(groups["sample_stats"]["log_weight"].values)
    torch.testing.assert_close(
        log_weights, dist.Normal(0.5, 5**0.5).log_prob(x).expand(1, number, 3), rtol=0, atol=1e-5
    )
    if number == 3:
        return
    sandwich = pv.bdmc(model, guide, x.repeat(50), 20, 8, seed=0, progress=False)
    ratio = (dist.Normal(0.5, 5**0.5).log_prob(sandwich.x) - sandwich.upper_per_datum).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5
    assert pv.RWS(4, sleep=1.0).differentiable_loss(model, guide, x).isfinite()


def test_a_deterministic_site_that_counts_from_the_left_is_refused():
    """Its value would be that of the first datum, for all of them."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.deterministic("double", 2 * z[:, 0])
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] / 2, 1.0).to_event(1))

    match = r"'double' has the shape \(3,\) for one particle, and \(\d+, 1\) for several"
    with pytest.raises(pv.PyroVAEError, match=match):
        pv.to_arviz(model, guide, torch.randn(3), 10)
    posterior = datasets(pv.to_arviz(model, guide, torch.randn(3), 10, vectorize_particles=False))["posterior"]
    np.testing.assert_allclose(posterior["double"].values, 2 * posterior["z"].values[..., 0])


def test_data_of_another_shape_than_their_distribution():
    """Four rows of one number, which a distribution of four numbers broadcasts to four rows each."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(1), obs=x)

    guide = pyro.poutine.block(model, hide=["x"])
    with pytest.raises(pv.PyroVAEError, match=r"observes data of shape \(4,\) where it draws some of shape \(4, 4\)"):
        pv.to_arviz(model, guide, torch.zeros(4), 3)
