"""Parameters that no minibatch uses before a later one: `pv.fit` trains them from then on, as Pyro's SVI does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

N, LR = 24, 0.02
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y, LABELLED = (X[:, 0] > 0).float(), torch.arange(N) >= 16
DATA = DataLoader(TensorDataset(X, Y, LABELLED), batch_size=8)  # the first of three minibatches has no label


def semi_supervised(runs=torch.any):
    """A model whose classifier runs only on minibatches with labels, its guide, and the classifier."""
    torch.manual_seed(1)
    pyro.clear_param_store()
    classifier, encoder = nn.Linear(3, 1), nn.Linear(3, 1)

    def model(x, y, labelled):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)
            if runs(labelled):
                pyro.module("classifier", classifier)
                with poutine.mask(mask=bool(labelled.all()) or labelled):
                    pyro.sample("y", dist.Bernoulli(logits=classifier(x)[:, 0]), obs=y)

    def guide(x, y, labelled):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, 0], 0.5))

    return model, guide, classifier


def fit(program, data=DATA, objective=None, **options):
    return pv.fit(*program[:2], data, objective or pv.ELBO(), lr=LR, seed=0, progress=False, **options)


def test_they_are_trained_as_by_svi():
    fitted = semi_supervised()
    fitted[2].weight.grad = torch.ones_like(fitted[2].weight)  # of an earlier training
    fit(fitted, epochs=20)
    own = semi_supervised()
    svi = pyro.infer.SVI(*own[:2], pyro.optim.Adam({"lr": LR}), pv.ELBO())
    for _ in range(20):
        for batch in DATA:
            svi.step(*batch)
    torch.testing.assert_close(fitted[2].weight, own[2].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("columns", [False, True], ids=["a loader", "tensors"])
def test_training_goes_on_bit_for_bit(columns, tmp_path):
    """Also with a scheduler of the step size, and with the best epoch's parameters."""
    data, size = (DATA.dataset.tensors, {"batch_size": 8}) if columns else (DATA, {})
    options = size | {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "validation": (X, Y, LABELLED),
        "patience": 9,
    }
    unbroken = semi_supervised()
    fit(unbroken, data, epochs=4, **options)
    for epochs in (2, 4):
        broken = semi_supervised()
        fit(broken, data, epochs=epochs, checkpoint=tmp_path / "c.pt", **options)
    assert all(map(torch.equal, unbroken[2].parameters(), broken[2].parameters()))
    loaded = semi_supervised()
    pv.load_parameters(tmp_path / "c.pt", *loaded[:2], *(column[16:] for column in DATA.dataset.tensors))
    assert torch.equal(loaded[2].weight, broken[2].weight)


def test_the_best_epoch_before_them_has_their_first_values():
    objective = pv.ELBO()
    program = semi_supervised(lambda labelled: objective.step > 3)  # from the second epoch on
    before = program[2].weight.detach().clone()
    history = fit(program, objective=objective, epochs=2, validation=(X, Y, LABELLED), patience=9)
    assert history.validation_bound.idxmax() == 1
    assert torch.equal(program[2].weight, before)


def test_a_value_for_each_row_is_refused_then_too():
    model, guide, _ = semi_supervised()

    def offset(x, y, labelled):
        model(x, y, labelled)
        loc = pyro.param("places", torch.zeros(len(x))) if labelled.any() else torch.zeros(len(x))
        with pyro.plate("rows", len(x)):
            pyro.sample("sum", dist.Normal(loc, 1.0), obs=x.sum(-1))

    with pytest.raises(pv.PyroVAEError, match="value for each row of a minibatch of 8: 'places'"):
        fit((offset, guide), epochs=1)


def test_networks_made_inside_the_model_are_refused_then_too():
    model, guide, _ = semi_supervised()

    def anew(x, y, labelled):
        model(x, y, labelled)
        if labelled.any():
            pyro.module("anew", nn.Linear(3, 1))

    with pytest.raises(pv.PyroVAEError, match=r"'anew.*' is another tensor each time"):
        fit((anew, guide), epochs=2)


def test_a_learned_scale_that_comes_later_starts_at_the_residuals():
    likelihood = pv.Gaussian(nn.Linear(1, 3), (3,), scale="learned")

    def model(x, y, labelled):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if labelled.any():
                pyro.module("likelihood", likelihood)
                pyro.sample("x", likelihood(z.unsqueeze(-1)), obs=1e-3 * x)
            else:
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)

    nn.init.zeros_(likelihood.decoder.weight)
    fit((model, semi_supervised()[1]), epochs=4)
    assert likelihood.log_scale < -0.5  # by its gradient alone, at most 12 steps of 0.02


def test_data_that_a_site_does_not_observe_need_not_be_in_its_support():
    labelled_first = [column.flip(0) for column in (X, Y.masked_fill(~LABELLED, -1), LABELLED)]
    for data in (DataLoader(TensorDataset(*labelled_first), batch_size=8), tuple(labelled_first)):
        program = semi_supervised(torch.all)
        options = {} if isinstance(data, DataLoader) else {"batch_size": 8}
        history = fit(program, data, epochs=1, **options)
        assert torch.tensor(history.train_bound.to_numpy()).isfinite().all()


@pytest.mark.parametrize("pyros", [False, True], ids=["fit", "compile_step"])
def test_compiled_code_refuses_them(pyros, without_inductor):
    network = nn.Linear(3, 3)

    def model(x):
        offset = pyro.param("offset", torch.tensor(0.0))
        if len(x) == 4:
            pyro.module("late", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(x) + offset, 1.0).to_event(1), obs=x)

    with pytest.raises(pv.PyroVAEError, match=r"of another kind to use no others, got 'late.*bias', 'late.*weight'"):
        if pyros:
            step = pv.compile_step(model, lambda x: None, pv.ELBO(), pyro.optim.Adam({}))
            for size in (8, 4):
                step(X[:size])
        else:
            pv.fit(model, lambda x: None, X[:20], pv.ELBO(), epochs=1, batch_size=8, compile=True, progress=False)
