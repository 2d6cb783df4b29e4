"""A trained pair in a pickle, in another process, in a graph of torch.export and in ONNX: the same numbers."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import is_dataclass

import pyro
import pytest
import torch
from helpers.matrix import N, rows, sampled
from helpers.quick import slow_but
from torch import nn
from torch.utils._pytree import tree_leaves

import pyro_vae as pv

ROWS = {f"{row.name}, {row.kind}": row for row in rows() if row.common}
PAIRS = [name for name in ROWS if name.endswith(" binary") and "prior" not in name and "missing" not in name]


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch.save": _saved, "deepcopy": copy.deepcopy}


def _results(pair, args):
    return [value.clone() for value in tree_leaves([pair.embed(*args), pair.reconstruct(*args)])]


def _same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _contents(result):
    """What a result has in itself, whose repr is a summary."""
    fields = vars(result) if is_dataclass(result) else result
    return type(result), repr(fields)


def _svi(pair, args, objective):
    pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective).step(*args)


def _vae():
    return pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,)), (torch.rand(N, 6).round(),)


@pytest.mark.parametrize("name", ROWS)
def test_a_copy_of_a_trained_pair_gives_the_same(name):
    pair, args = ROWS[name].build()
    _svi(pair, args, sampled(ROWS[name]))
    expected = _results(pair, args)
    for way, through in WAYS.items():
        other = through(pair)
        assert _same(_results(other, args), expected), way
        assert [key for key, _ in other.named_parameters()] == [key for key, _ in pair.named_parameters()], way
        memory = {value.data_ptr() for value in pair.parameters()}
        assert memory.isdisjoint(value.data_ptr() for value in other.parameters()), way


TRAINED = {
    "fit": lambda pair, x: pv.fit(pair, x, pv.ELBO(), epochs=1, batch_size=6, progress=False),
    "a compiled step": lambda pair, x: pv.compile_step(pair, pv.ELBO(), torch.optim.Adam(pair.parameters()))(x),
    "an evaluation": lambda pair, x: pv.log_likelihood(pair, x, 100, progress=False),
    "Pyro's own loss": lambda pair, x: _svi(pair, (x,), pyro.infer.Trace_ELBO()),
}


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("after", TRAINED)
def test_pickling_works_after_whatever_ran_and_leaves_the_pair_alone(after, without_inductor):
    pair, (x,) = _vae()
    TRAINED[after](pair, x)
    weight = pair.posterior.encoder[1].weight
    weight.note = "kept"
    reference = weight.unconstrained  # Pyro's, by which an optimiser may still look for the parameter
    assert WAYS["pickle"](pair).posterior.encoder[1].weight.note == "kept"
    assert weight.unconstrained is reference
    # Networks that are no pair, a method, and an optimiser.
    encoder, embed, _ = WAYS["pickle"]([pair.posterior.encoder, pair.embed, torch.optim.Adam(pair.parameters())])
    assert torch.equal(encoder(x), pair.posterior.encoder(x))
    assert torch.equal(embed(x), pair.embed(x))


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_beside_the_original_has_parameters_of_its_own(way):
    pair, (x,) = _vae()
    pv.fit(pair, x, pv.ELBO(), epochs=1, progress=False)
    other = WAYS[way](pair)

    def estimate(of):
        pyro.set_rng_seed(1)
        return pv.log_likelihood(of, x, 100, progress=False).per_datum

    def train(which, beside):
        before, still = copy.deepcopy(which.state_dict()), copy.deepcopy(beside.state_dict())
        pv.fit(which, x, pv.ELBO(), epochs=1, progress=False)
        assert not any(torch.equal(value, before[key]) for key, value in which.named_parameters())
        assert all(torch.equal(value, still[key]) for key, value in beside.named_parameters())

    first = estimate(pair)
    assert torch.equal(estimate(other), first)
    train(other, beside=pair)
    assert not torch.equal(estimate(other), first)
    assert torch.equal(estimate(pair), first)
    train(pair, beside=other)


@pytest.mark.parametrize("way", WAYS)
def test_an_objective_of_a_pair_is_copied_with_its_pair(way):
    pair, (x,) = _vae()
    module = pv.IWAE(3)(pair)
    module(x).backward()
    other = WAYS[way](module)
    pair.zero_grad()
    losses = []
    for each in (other, module):
        pyro.set_rng_seed(1)
        losses.append(each(x))
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(value.grad is not None for value in other.parameters())
    assert all(value.grad is None for value in pair.parameters())


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_results_and_schedules_are_copied_whole():
    pair, (x,) = _vae()
    found = [
        pv.fit(pair, x, pv.ELBO(beta=pv.schedules.warm_up(2)), epochs=1, progress=False),
        pv.ELBO(beta=pv.schedules.cyclical(4)),
        pv.Estimate.of(torch.randn(5)),
        pv.log_likelihood(pair, x, 100, progress=False),
        pv.inference_gaps(pair, x, num_steps=2, num_samples=10, progress=False),
        pv.decompose_elbo(pair, x),
    ]
    for way, through in WAYS.items():
        for value in found:
            assert _contents(through(value)) == _contents(value), way


FRESH = """
import sys, torch, pyro_vae as pv
from torch.utils._pytree import tree_leaves
torch.set_num_threads(1)
saved = torch.load(sys.argv[1], weights_only=False)
for pair, args, objective, expected in saved:
    found = tree_leaves([pair.embed(*args), pair.reconstruct(*args)])
    assert all(map(torch.equal, found, expected)), type(pair)
    pv.fit(pair, args, objective, epochs=2, batch_size=6, seed=0, progress=False)
torch.save([pair for pair, *_ in saved], sys.argv[1])
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_as_this_one_would(tmp_path):
    built = []
    for name in PAIRS:
        pair, args = ROWS[name].build()
        pv.fit(pair, args, sampled(ROWS[name]), epochs=1, progress=False)
        built.append((pair, args, sampled(ROWS[name]), _results(pair, args)))
    torch.save(built, tmp_path / "pairs.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, tmp_path / "pairs.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (pair, args, objective, _), there in zip(
        built, torch.load(tmp_path / "pairs.pt", weights_only=False), strict=True
    ):
        pv.fit(pair, args, objective, epochs=2, batch_size=6, seed=0, progress=False)
        assert _same(list(pair.parameters()), list(there.parameters())), type(pair)


@pytest.mark.slow
def test_spawned_processes_and_joblib_run_a_trained_pair():
    joblib = pytest.importorskip("joblib")
    pair, (x,) = _vae()
    pv.fit(pair, x, pv.ELBO(), epochs=1, progress=False)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(pair.reconstruct, x).result(), pair.reconstruct(x))
    parts = x.split(3)
    assert len(parts) == 4
    found = joblib.Parallel(n_jobs=4)(joblib.delayed(pair.embed)(part) for part in parts)
    assert _same(found, [pair.embed(part) for part in parts])


def _fewer(args):
    return tuple(value[:5] for value in args)


def _exported(pair, args):
    program = torch.export.export(pair, args, dynamic_shapes=({0: torch.export.Dim("batch")},) * len(args))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("name", slow_but(["ConditionalVAE, binary", "HierarchicalVAE, ladder, binary"], ROWS))
def test_an_exported_pair_gives_the_same_for_any_number_of_data(name):
    pair, args = ROWS[name].build()
    _svi(pair, args, sampled(ROWS[name]))
    for method in (pair.embed, pair.reconstruct):
        pair.forward = method
        exported = _exported(pair, args)
        for each in (args, _fewer(args)):
            found = tree_leaves(exported(*each))
            assert _same(found, tree_leaves(method(*each)))
            assert not any(value.requires_grad for value in found)


def test_an_export_is_in_evaluation_mode_and_leaves_modes_and_checks_on():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    pair = pv.VAE(
        prior=pv.StandardNormal(2),
        likelihood=pv.Bernoulli(nn.Linear(2, 6), (6,)),
        posterior=pv.DiagonalNormal(encoder, (6,)),
    )
    x = torch.rand(N, 6).round()
    pv.fit(pair, x, pv.ELBO(), epochs=1, progress=False)
    pair.forward = pair.reconstruct
    exported = _exported(pair, (x,))
    assert torch.equal(exported(x), pair.reconstruct(x))
    assert encoder.training
    with pytest.raises(pv.PyroVAEError, match="zeros and ones"):
        pair.reconstruct(x + 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*axis name")
@pytest.mark.parametrize("name", ["VAE, binary", "ConditionalVAE, binary", "VAE, convolutions, binary"])
def test_onnx_gives_the_same_for_any_number_of_data(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    pair, args = ROWS[name].build()
    _svi(pair, args, sampled(ROWS[name]))
    pair.eval()
    for method in (pair.embed, pair.reconstruct):
        pair.forward = method
        path = tmp_path / f"{method.__name__}.onnx"
        torch.onnx.export(pair, args, path, dynamo=True, dynamic_shapes=({0: "batch"},) * len(args), verbose=False)
        session = onnxruntime.InferenceSession(path)
        names = [given.name for given in session.get_inputs()]
        for each in (args, _fewer(args)):
            found = session.run(None, dict(zip(names, (value.numpy() for value in each), strict=True)))
            # At most ten layers, each of sums of at most 48 terms of about 1, which rounding moves by 48 eps.
            atol = 10 * 48 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(torch.tensor(found[0]), method(*each), rtol=0, atol=atol)
