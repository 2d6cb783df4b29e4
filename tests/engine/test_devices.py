"""Data go to the program's device in fit and evaluations; direct calls refuse those that are elsewhere."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.pretended_gpu import OnGPU, pretended_gpu
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.devices import OtherDeviceError

X = torch.rand(12, 5)
SEEN = X > 0.3


def pair(**options):
    return pv.mlp_vae((5,), latent_dim=2, hidden_dims=(4,), **{"likelihood": "gaussian", **options})


def program(kind, device):
    """A program with its parameters on a device, as a pair, or as plain functions with modules or parameters."""
    if kind == "pair":
        return pair().to(device)
    encoder, decoder = nn.Linear(5, 2).to(device), nn.Linear(2, 5).to(device)

    def linear(name, layer, value):
        if kind == "modules":
            return pyro.module(name, layer)(value)
        return nn.functional.linear(value, *(pyro.param(f"{name}.{n}", p.data) for n, p in layer.named_parameters()))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(linear("decoder", decoder, z), 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", lambda: x.new_ones(2), dist.constraints.positive)  # where the data are
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(linear("encoder", encoder, x), scale).to_event(1))

    return model, guide


DIRECT = {
    "bound": lambda program, x: pv.ELBO().bound(program, x),
    "several particles": lambda program, x: pv.IWAE(3).differentiable_loss(program, x),
    "loss_and_grads": lambda program, x: pv.ELBO().loss_and_grads(program, x),
    "module": lambda program, x: pv.ELBO()(program)(x),
    "log_weights": lambda program, x: pv.log_weights(program, x, num_particles=1),
    "compiled": lambda program, x: pv.compile_step(program, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))(x),
}


@pytest.mark.parametrize("call", DIRECT)
@pytest.mark.parametrize("kind", ["pair", "modules", "parameters"])
@pytest.mark.parametrize(("own", "other"), [("meta", "cpu"), ("cpu", "meta")])
def test_direct_calls_refuse_data_on_another_device(kind, call, own, other):
    expected = rf"^expected x on {own}, the device of the parameters, got {other}. Pass x.to\('{own}'\).$"
    with pytest.raises(pv.PyroVAEError, match=expected):
        DIRECT[call](program(kind, own), torch.ones(4, 5, device=other))


@pytest.mark.parametrize("method", ["generate", "embed", "reconstruct"])
def test_networks_without_values_are_refused(method):
    vae = program("pair", "meta")
    with pytest.raises(pv.PyroVAEError, match=r"^expected data and parameters with values, got a tensor on 'meta'"):
        getattr(vae, method)(3 if method == "generate" else torch.ones(4, 5, device="meta"))


def conditional():
    return pv.mlp_conditional_vae((5,), latent_dim=2, label_dim=3, hidden_dims=(4,), likelihood="gaussian")


def semi_supervised():
    return pv.mlp_semi_supervised_vae((5,), latent_dim=2, num_classes=3, hidden_dims=(4,), likelihood="gaussian")


def hierarchical(guide):
    return pv.mlp_hierarchical_vae((5,), latent_dims=(3, 2), hidden_dims=(4, 4), likelihood="gaussian", guide=guide)


def autoencoder():
    return pv.mlp_autoencoder((5,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")


LABELS = torch.zeros(4, dtype=torch.long)
METHODS = [
    *[(pair, method, "x", lambda x, here: (x,)) for method in ("model", "guide", "embed", "reconstruct")],
    *[(pair, method, "mask", lambda x, here: (here, x > 0)) for method in ("model", "guide", "embed", "impute")],
    (pair, "decode", "z", lambda x, here: (x[:, :2],)),
    *[(conditional, m, "y", lambda x, here: (here, LABELS.to(x.device))) for m in ("model", "guide", "embed")],
    (conditional, "generate", "y", lambda x, here: (LABELS.to(x.device),)),
    *[(semi_supervised, m, "y", lambda x, here: (here, LABELS.to(x.device))) for m in ("model", "guide", "embed")],
    (semi_supervised, "classify", "x", lambda x, here: (x,)),
    *[(lambda: hierarchical("ladder"), method, "x", lambda x, here: (x,)) for method in ("model", "guide", "embed")],
    *[(autoencoder, method, "x", lambda x, here: (x,)) for method in ("model", "embed", "reconstruct")],
]


@pytest.mark.parametrize(("build", "method", "name", "args"), METHODS)
def test_pairs_refuse_data_masks_and_labels_on_another_device(build, method, name, args):
    call = getattr(build().to("meta"), method)
    with pytest.raises(pv.PyroVAEError, match=f"^expected {name} on meta, the device of the parameters, got cpu."):
        call(*args(torch.ones(4, 5), torch.ones(4, 5, device="meta")))


def test_a_refusal_names_a_keyword_and_what_holds_the_tensors():
    def model(x, parts=()):
        net = pyro.module("net", layer)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(parts[0]), 1.0).to_event(1), obs=x)

    layer, x = nn.Linear(5, 5).to("meta"), torch.ones(4, 5, device="meta")
    with pytest.raises(OtherDeviceError, match=r"^expected parts on meta.*Pass the tensors of parts on 'meta'.$"):
        pv.ELBO().bound(model, lambda x, parts=(): None, x, parts=[torch.ones(4, 5)])


def mean_field(device):
    """A guide whose parameters are made beside x, and a model whose parameters are on a device."""

    def model(x):
        loc, scale = pyro.param("loc", torch.zeros(5, device=device)), pyro.param("scale", torch.ones(5, device=device))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, device=device), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z, scale).to_event(1), obs=x)

    def guide(x):
        mean = pyro.param("mean", lambda: x.new_zeros(5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    return model, guide


def test_a_refused_call_leaves_no_parameter_on_the_other_device():
    """The guide makes its own beside x, before the model fails; else the right call would fail too."""
    with pretended_gpu() as gpu:
        for _ in range(2):
            with pytest.raises(OtherDeviceError, match=r"^expected x on mps:0"):
                pv.ELBO().bound(mean_field(gpu), X)
        assert isinstance(pv.ELBO().bound(mean_field(gpu), X.to(gpu)), OnGPU)


def test_data_are_refused_or_moved_where_only_their_density_meets_a_parameter():
    def model(x):
        loc = pyro.param("loc", torch.zeros(5, device=gpu))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pretended_gpu() as gpu:
        with pytest.raises(OtherDeviceError, match=r"^expected x on mps:0"):
            pv.ELBO().bound(model, lambda x: None, X)
        assert pv.log_likelihood(model, lambda x: None, X, 2, progress=False).per_datum.isfinite().all()


def test_no_argument_is_refused_where_parameters_are_on_several_devices():
    pyro.param("loc", torch.zeros(5))
    pyro.param("more", torch.zeros(5, device="meta"))

    def model(x):
        loc = pyro.param("loc") + pyro.param("more")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    for given in (X, X.to("meta")):
        with pytest.raises(RuntimeError, match="Tensor on device meta is not on the expected device cpu"):
            pv.ELBO().bound(model, lambda x: None, given)


def data(kind, device="cpu"):
    """The rows as each kind of data that fit takes."""
    x, seen = X.to(device), SEEN.to(device)
    if kind == "loader":
        return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    if kind == "split":
        return pv.data.Split(x[:, None, None], None)
    return {"tensor": x, "tuple": (x, seen), "tuple on two devices": (x, SEEN)}[kind]


def trained(build, given, device, **options):
    """The bounds of a training."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trained = build(device)
    held_out = None if isinstance(given, DataLoader) else given
    batch_size = None if isinstance(given, DataLoader) else 4
    options = {"epochs": 2, "batch_size": batch_size, "validation": held_out, "progress": False} | options
    history = pv.fit(trained, given, pv.ELBO(kl="monte_carlo"), seed=1, **options)
    return history.drop(columns="seconds").fillna(0.0).to_numpy().tolist()


def images(device):
    return pv.mlp_vae((1, 1, 5), latent_dim=2, hidden_dims=(4,), likelihood="gaussian").to(device)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "loader", "split"])
def test_fit_moves_minibatches_and_draws_the_same_numbers(kind):
    build = images if kind == "split" else lambda device: program("pair", device)
    expected = trained(build, data(kind), "cpu")
    with pretended_gpu() as gpu:
        assert trained(build, data(kind), gpu) == expected


@pytest.mark.parametrize("kind", ["pair", "modules", "parameters"])
def test_fit_moves_minibatches_to_any_program(kind):
    expected = trained(lambda device: program(kind, device), X, "cpu")
    with pretended_gpu() as gpu:
        assert trained(lambda device: program(kind, device), X, gpu) == expected
        devices = {parameter.device for parameter in pyro.get_param_store()._params.values()}
        assert devices == {gpu}  # also of the scale, which the guide makes beside x


@pytest.mark.parametrize("kind", ["tensor", "tuple", "loader", "tuple on two devices"])
def test_fit_moves_data_from_a_gpu_to_a_program_on_the_cpu(kind):
    expected = trained(lambda device: program("pair", device), data(kind.split(" ")[0]), "cpu")
    with pretended_gpu() as gpu:
        assert trained(lambda device: program("pair", device), data(kind, gpu), "cpu") == expected


@pytest.mark.parametrize("parts", ["moves itself", "two devices", "no parameters"])
def test_programs_that_place_their_data_themselves_are_left_alone(parts):
    seen = set()

    def model(x):
        seen.add(type(x))
        if parts == "no parameters":
            loc = torch.zeros(5)
        else:
            weight = pyro.param("weight", torch.ones(5, device=gpu))
            bias = pyro.param("bias", torch.ones(5, device="cpu" if parts == "two devices" else gpu))
            loc = weight + bias.to(gpu)
            x = x.to(gpu)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pretended_gpu() as gpu:
        if parts != "no parameters":
            pv.fit((model, lambda x: None), X, pv.ELBO(), epochs=1, batch_size=4, validation=X, progress=False)
        pv.log_likelihood((model, lambda x: None), X, 2, progress=False)
    assert seen == {torch.Tensor}


def test_an_error_that_has_nothing_to_do_with_devices_stays():
    def model(x):
        pyro.param("loc", torch.zeros(5, device="meta"))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        pv.ELBO().bound(model, lambda x: None, X)


QUIET = {"seed": 0, "progress": False}
SHORT = {"num_steps": 2, "num_chains": 2, "num_leapfrog": 1, **QUIET}
EVALUATIONS = {
    "log_likelihood": lambda p, x, _: pv.log_likelihood(p, x, 30, **QUIET).per_datum,
    "one by one": lambda p, x, _: pv.log_likelihood(p, x, 3, vectorize_particles=False, **QUIET).elbo,
    "ais": lambda p, x, device: pv.ais(p, x, schedule=torch.linspace(0, 1, 3).to(device), **SHORT).per_datum,
    "bdmc": lambda p, x, _: pv.bdmc(p, x, start="guide", **SHORT).upper_per_datum,
    "gaps": lambda p, x, _: pv.inference_gaps(p, x, 5, num_steps=2, **QUIET).best_elbo,
    "decompose_elbo": lambda p, x, _: [pv.decompose_elbo(p, x, 3, **QUIET).marginal_kl.value],
    "active_units": lambda p, x, _: pv.active_units(p, x, 3, seed=0).kl.tolist(),
    "compare": lambda p, x, _: pv.compare(p, x, [pv.JVI(3, 1)], repeats=5, **QUIET).bound.tolist(),
    "to_arviz": lambda p, x, _: pv.to_arviz(p, x, 3, seed=0)["posterior_predictive"]["x"].values.flatten(),
}


@pytest.mark.parametrize("kind", ["tensor", "loader"])
@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_evaluations_move_minibatches_and_take_float64_to_the_cpu(name, kind, monkeypatch):
    """The results are those of the CPU, bit for bit: no operation on float64 has run on the device, which has none."""
    vae = program("pair", "cpu")
    x = X[:4]
    if kind == "loader":
        monkeypatch.setattr("pyro_vae.evaluation.parts.rows_at_once", lambda args: 2)
        x = DataLoader(x, batch_size=2)
    expected = torch.as_tensor(EVALUATIONS[name](vae, x, "cpu"))
    with pretended_gpu() as gpu:
        found = torch.as_tensor(EVALUATIONS[name](vae.to(gpu), x, gpu))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("likelihood", ["poisson", "student_t", "low_rank_gaussian"])
def test_likelihoods_take_float64_to_the_cpu(likelihood):
    rank = {"rank": 2} if likelihood == "low_rank_gaussian" else {}
    vae, x = pair(likelihood=likelihood, **rank), X.round()
    pyro.set_rng_seed(0)
    expected = pv.ELBO().bound(vae, x)
    with pretended_gpu() as gpu:
        pyro.set_rng_seed(0)
        found = pv.ELBO().bound(vae.to(gpu), x.to(gpu))
        assert isinstance(found, OnGPU)
        assert torch.equal(found.cpu(), expected)


def test_the_pretended_gpu_has_no_float64():
    with pretended_gpu() as gpu, pytest.raises(TypeError, match="float64"):
        X.to(gpu).double()


def out_of_memory(where):
    """A model that needs too much memory, when it runs or in its backward pass."""

    def full(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def model(x):
        loc = pyro.param("loc", torch.zeros(5))
        if where == "forward" and len(x) > 1:
            full(loc)
        if where == "backward" and torch.is_grad_enabled():
            loc = loc * 1.0
            loc.register_hook(full)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if where == "many particles" and len(z) == 6:
                full(z)
            pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


IN_FIT = "in training. Pass a smaller batch_size (now 4)"
IN_EVALUATION = "in an evaluation. Pass fewer rows of x (now 12), or set pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE"
MEMORY = [
    ("forward", lambda p: pv.fit(p, X, pv.ELBO(), epochs=1, batch_size=4), f"{IN_FIT}."),
    ("backward", lambda p: pv.fit(p, X, pv.ELBO(), epochs=1, batch_size=4), f"{IN_FIT}."),
    (
        "backward",
        lambda p: pv.fit(p, X, pv.IWAE(6, chunk_size=3), epochs=1, batch_size=4),
        f"{IN_FIT}, chunk_size (now 3), num_particles (now 6).",
    ),
    (
        "many particles",
        lambda p: pv.IWAE(6).bound(p, X),
        "in bound. Pass a smaller chunk_size (now None) or num_particles (now 6), or fewer rows of data.",
    ),
    (
        "many particles",
        lambda p: pv.log_weights(p, X, num_particles=6, chunk_size=6),
        "in log_weights. Pass a smaller chunk_size (now 6) or num_particles (now 6), or fewer rows of data.",
    ),
    ("forward", lambda p: pv.log_likelihood(p, X, 10), IN_EVALUATION),
    ("forward", lambda p: pv.inference_gaps(p, X, 10), IN_EVALUATION),
    ("forward", lambda p: pv.to_arviz(p, X, 10), IN_EVALUATION),
    ("forward", lambda p: pv.ELBO().bound(p, X), "in bound. Pass fewer rows of data."),
    (
        "forward",
        lambda p: pv.IWAE(6).differentiable_loss(p, X),
        "in differentiable_loss. Pass a smaller chunk_size (now None) or num_particles (now 6), or fewer rows of data.",
    ),
]


@pytest.mark.parametrize(("where", "call", "note"), MEMORY)
def test_out_of_memory_says_what_to_make_smaller(where, call, note):
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory") as caught:
        call(out_of_memory(where))
    (said,) = caught.value.__notes__
    assert said.startswith(f"pyro_vae ran out of memory {note}")
