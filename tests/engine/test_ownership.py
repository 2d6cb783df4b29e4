"""What a program holds now is what is trained, saved and loaded: networks made anew, stores, names that clash."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn

import pyro_vae as pv

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def linear(decoder=None, name="decoder", **options):
    """A model and a guide whose networks are made here, and the decoder."""
    decoder, encoder = decoder or nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        pyro.module(name, decoder, **options)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return model, guide, decoder


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.network = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor(0.7), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.network(z), self.scale).to_event(1), obs=x)


class Encoder(PyroModule):
    def __init__(self, width="width"):
        super().__init__()
        self.encoder, self.name_of_width = PyroModule[nn.Linear](3, 2), width
        setattr(self, width, PyroParam(torch.tensor(0.6), dist.constraints.positive))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), getattr(self, self.name_of_width)).to_event(1))


class Both(PyroModule):
    """A program as methods, which no call of a module surrounds."""

    def __init__(self):
        super().__init__()
        self.slope = PyroParam(torch.tensor(0.3))
        self.width = PyroParam(torch.tensor(0.6), dist.constraints.positive)

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.width).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.5).to_event(1))


def modules_called():
    decoder, encoder = Decoder(), Encoder()
    return decoder, encoder, decoder, encoder


def modules_in_functions():
    decoder, encoder, *_ = modules_called()
    return lambda x: decoder(x), lambda x: encoder(x), decoder, encoder


def methods_of(module):
    return module.model, module.guide, module


def with_autoguide(guide):
    def build():
        model, _, decoder = linear()
        made = guide(model)
        return model, made, decoder, made

    return build


# Each makes a model, a guide and modules with parameters.
PROGRAMS = {
    "pyro.module": linear,
    "PyroModule": modules_called,
    "PyroModule in a function": modules_in_functions,
    "PyroModule's methods": lambda: methods_of(Both()),
    "AutoNormal": with_autoguide(AutoNormal),
    "AutoDiagonalNormal": with_autoguide(AutoDiagonalNormal),
    "AutoNormalMessenger": with_autoguide(AutoNormalMessenger),
    "pair": lambda: methods_of(pv.mlp_vae((3,), latent_dim=2, likelihood="gaussian")),
}


def made_and_fitted(build, path=None):
    pyro.set_rng_seed(0)
    model, guide, *modules = build()
    options = {"epochs": 2, "batch_size": len(X), "lr": 0.1, "seed": 0, "progress": False, "checkpoint": path}
    history = pv.fit(model, guide, X, pv.ELBO(kl="monte_carlo"), **options)
    return history.train_bound.tolist(), model, guide, modules


def values(modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", PROGRAMS)
def test_networks_made_anew_are_trained_as_the_first_were(name):
    folds = [made_and_fitted(PROGRAMS[name]) for _ in range(3)]
    assert folds[0][0] == folds[1][0] == folds[2][0]
    assert equal(values(folds[0][3]), values(folds[1][3]))
    before = values(folds[0][3])
    pyro.set_rng_seed(0)
    assert not equal(before, values(PROGRAMS[name]()[2:]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_networks_of_before_keep_their_parameters(name):
    """Two programs under the same names take turns, as where they are compared."""
    _, model, guide, modules = made_and_fitted(PROGRAMS[name])
    before, loss = values(modules), _loss(model, guide)
    _, *others = made_and_fitted(PROGRAMS[name])
    _loss(*others[:2])
    assert _loss(model, guide) == loss
    assert equal(values(modules), before)


def _loss(model, guide):
    pyro.set_rng_seed(1)
    return pv.ELBO(kl="monte_carlo").loss(model, guide, X)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_checkpoint_is_loaded_into_networks_made_anew(name, tmp_path):
    _, model, guide, modules = made_and_fitted(PROGRAMS[name], tmp_path / "c.pt")
    model, guide, *fresh = PROGRAMS[name]()
    pv.load_parameters(tmp_path / "c.pt", model, guide, X)
    assert equal(values(modules), values(fresh))
    assert not {id(p) for m in modules for p in m.parameters()} & {id(p) for m in fresh for p in m.parameters()}


def test_training_goes_on_from_a_checkpoint_with_networks_made_anew(tmp_path):
    for epochs in (1, 3):
        torch.manual_seed(epochs)
        model, guide, decoder = linear()
        options = {"batch_size": 5, "lr": 0.1, "seed": 0, "progress": False}
        pv.fit(model, guide, X, pv.ELBO(), epochs=epochs, checkpoint=tmp_path / "c.pt", **options)
    torch.manual_seed(1)
    model, guide, unbroken = linear()
    pv.fit(model, guide, X, pv.ELBO(), epochs=3, **options)
    assert torch.equal(decoder.weight, unbroken.weight)


@pytest.mark.parametrize("loss", [pv.ELBO, Trace_ELBO])
def test_pyros_own_training_sees_the_networks_made_anew(loss):
    for _ in range(2):
        model, guide, decoder = linear()
        pv.ELBO().loss(model, guide, X)
        before = decoder.weight.detach().clone()
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss()).step(X)
        assert not torch.equal(decoder.weight, before)


@pytest.mark.slow
def test_compiled_steps_train_the_networks_made_anew(without_inductor):
    for _ in range(2):
        model, guide, decoder = linear()
        step = pv.compile_step(model, guide, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
        for weight in (decoder.weight, nn.Parameter(torch.ones(3, 2))):
            decoder.weight, before = weight, weight.detach().clone()
            step(X)
            assert not torch.equal(decoder.weight, before)


@pytest.mark.slow
def test_compiled_steps_train_a_new_part_of_a_pair(without_inductor):
    vae, other = (pv.mlp_vae((3,), latent_dim=2, likelihood="gaussian") for _ in range(2))
    step = pv.compile_step(vae, pv.ELBO(), pyro.optim.Adam({"lr": 0.1}))
    step(X)
    vae.likelihood, before = other.likelihood, values([other.likelihood])
    step(X)
    assert not any(map(torch.equal, values([vae.likelihood]), before))


def test_a_parameter_of_any_memory_layout_is_trained():
    """The store would hold a contiguous copy."""
    decoder = nn.Linear(2, 3)
    decoder.weight = nn.Parameter(decoder.weight.detach().T.contiguous().T)
    before = decoder.weight.detach().clone()
    made_and_fitted(lambda: linear(decoder))
    assert not torch.equal(decoder.weight, before)


def test_a_pyro_param_is_the_stores():
    """Its initial value is made anew in each run, also as an nn.Parameter."""

    def model(x):
        loc = pyro.param("loc", nn.Parameter(torch.zeros(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    for step in (1, 2):  # one step of Adam a call
        pv.fit(model, lambda x: None, X, pv.ELBO(), epochs=1, lr=0.1, progress=False)
        assert torch.allclose(pyro.param("loc").abs(), torch.full((3,), 0.1 * step), rtol=0.05)


def test_a_module_takes_from_the_store_on_demand():
    trained = made_and_fitted(PROGRAMS["pyro.module"])[3][0]
    model, guide, decoder = linear(update_module_params=True)
    pv.ELBO().loss(model, guide, X)
    assert decoder.weight is trained.weight


def test_a_new_autoguide_takes_what_was_loaded_into_the_store():
    guide = made_and_fitted(PROGRAMS["AutoNormal"])[2]
    copies = {name: nn.Parameter(value.detach().clone()) for name, value in pyro.get_param_store().named_parameters()}
    pyro.get_param_store().set_state(pyro.get_param_store().get_state() | {"params": copies})
    model, fresh, *_ = PROGRAMS["AutoNormal"]()
    pv.ELBO(kl="monte_carlo").loss(model, fresh, X)
    assert torch.equal(fresh.locs.z, guide.locs.z)


def test_modules_keep_their_own_where_pyro_keeps_them_apart():
    with pyro.settings.context(module_local_params=True):
        first, second = (made_and_fitted(PROGRAMS["PyroModule"]) for _ in range(2))
    assert first[0] == second[0]


def _twice_in_model():
    model, guide, _ = linear()
    other = nn.Linear(2, 3)
    return lambda x: (pyro.module("decoder", other), model(x)), guide


def _in_model_and_guide():
    model, guide, _ = linear(name="encoder")
    return model, guide


CLASHES = {
    "in the model": _twice_in_model,
    "in model and guide": _in_model_and_guide,
    "attributes": lambda: (Decoder(), Encoder("scale")),
}


@pytest.mark.parametrize("name", CLASHES)
def test_two_modules_of_one_name_are_refused(name, tmp_path):
    program = CLASHES[name]()
    with pytest.raises(ValueError, match=r"two modules with a parameter '(decoder|encoder|scale).*Pass other names"):
        pv.fit(program, X, pv.ELBO(kl="monte_carlo"), epochs=1, progress=False)
    with pytest.raises(ValueError, match="two modules with a parameter"):
        pv.compile_step(program, pv.ELBO(), pyro.optim.Adam({}))(X)
    with pytest.raises(ValueError, match="two modules with a parameter"):
        SVI(*program, pyro.optim.Adam({}), pv.IWAE(5)).step(X)
    with torch.no_grad():
        assert pv.IWAE(5).bound(program, X).isfinite().all()  # each network runs with its own


def test_a_second_module_of_a_trained_one_s_name_is_refused():
    model, guide, _ = linear()
    pv.fit(model, guide, X, pv.ELBO(), epochs=1, progress=False)
    other = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="two modules with a parameter"):
        pv.fit(lambda x: (model(x), pyro.module("decoder", other)), guide, X, pv.ELBO(), epochs=1, progress=False)


def test_networks_made_inside_the_model_are_refused():
    _, guide, _ = linear()
    with pytest.raises(ValueError, match=r"'decoder\$\$\$\w+' is another tensor each time.*outside of both"):
        pv.fit(lambda x: linear()[0](x), guide, X, pv.ELBO(), epochs=1, progress=False)
