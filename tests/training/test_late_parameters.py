"""Parameters that the first minibatch does not use: a branch of the program needs them for some data alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

N, B = 60, 20
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR)
DATA = (X, (X[:, 0] > 0).float(), torch.arange(N) >= 2 * B)  # the first two minibatches have no labels


def program(early):
    """A model of x, and of labels where there are some; `early` registers the classifier before the branch."""
    torch.manual_seed(1)
    classifier, encoder = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

    def model(x, y, labelled):
        if early:
            pyro.module("classifier", classifier)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)
            if labelled.any():
                pyro.module("classifier", classifier)
                with poutine.mask(mask=labelled):
                    pyro.sample("y", dist.Bernoulli(logits=classifier(x)[:, 0]), obs=y)

    def guide(x, y, labelled):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, 0], 0.5))

    return model, guide, classifier, encoder


def trained(early, epochs=2, **options):
    pyro.clear_param_store()
    model, guide, classifier, encoder = program(early)
    before = classifier.weight.clone()
    data = DataLoader(TensorDataset(*DATA), batch_size=B)
    pv.fit(model, guide, data, pv.IWAE(3), epochs=epochs, lr=0.01, seed=0, progress=False, **options)
    assert not torch.equal(classifier.weight, before)
    return [*classifier.parameters(), *encoder.parameters()]


def same(first, second):
    return all(map(torch.equal, first, second))


def test_they_are_trained_as_if_the_first_minibatch_used_them():
    assert same(trained(early=False), trained(early=True))


@pytest.mark.parametrize("patience", [None, 5])
def test_resuming_finds_them_again(tmp_path, patience):
    options = {"patience": patience, "validation": DATA} if patience else {}
    whole = trained(False, 4, **options)
    path = tmp_path / "checkpoint.pt"
    trained(False, 2, checkpoint=path, **options)
    assert same(trained(False, 4, checkpoint=path, **options), whole)
    model, guide, classifier, _ = program(early=False)
    pyro.clear_param_store()
    pv.load_parameters(path, model, guide, *DATA)
    assert torch.equal(classifier.weight, whole[0])


def test_another_program_is_still_told_by_its_parameters(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained(False, 2, checkpoint=path)
    model, guide, _, _ = program(early=False)
    pyro.clear_param_store()

    def without_labels(x, y, labelled):
        model(x, y, torch.zeros_like(labelled))

    data = DataLoader(TensorDataset(*DATA), batch_size=B)
    with pytest.raises(pv.PyroVAEError, match=r"another program: expected its parameter 'classifier.*bias'"):
        pv.fit(without_labels, guide, data, pv.IWAE(3), epochs=3, lr=0.01, seed=0, progress=False, checkpoint=path)


@pytest.mark.slow
def test_compiled_code_refuses_them():
    _, guide, classifier, _ = program(early=False)

    def sized(x, y, labelled):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)
            if len(x) < B:
                pyro.module("classifier", classifier)
                pyro.sample("y", dist.Bernoulli(logits=classifier(x)[:, 0]), obs=y)

    pyro.clear_param_store()
    loader = DataLoader(TensorDataset(*(column[: B + 5] for column in DATA)), batch_size=B)
    with pytest.raises(pv.PyroVAEError, match=r"some minibatches alone use the parameters \['classifier.*bias'"):
        pv.fit(sized, guide, loader, pv.ELBO(), epochs=1, compile=True, progress=False)
