"""Arguments are what their annotations say: refused where they are not, and made Python's numbers where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import networks
from pyro_vae.checks import Between, Count, Seed, Shape, checked, kind_of
from tests.helpers.random_calls import faults


class Options(TypedDict, total=False):
    width: Count


@checked
def function(
    count: Count = 1,
    number: float = 0.0,
    flag: bool = False,
    shape: Shape = (1,),
    x: Tensor | None = None,
    path: str | Path = "a",
    module: nn.Module | None = None,
    anything: Any = None,
    **options: Unpack[Options],
) -> tuple[Any, ...]:
    return count, number, flag, shape, x, path, module, anything, options


@pytest.mark.parametrize(
    ("arguments", "place", "converted"),
    [
        ({"count": np.int64(3)}, 0, 3),
        ({"count": torch.tensor(3)}, 0, 3),
        ({"number": 2}, 1, 2),
        ({"number": np.float32(0.5)}, 1, 0.5),
        ({"number": torch.tensor(0.5)}, 1, 0.5),
        ({"number": math.inf}, 1, math.inf),
        ({"flag": np.bool_(True)}, 2, True),
        ({"flag": 0}, 2, False),
        ({"number": np.array(0.5)}, 1, 0.5),
        ({"shape": iter([4, 5])}, 3, (4, 5)),
        ({"shape": [4, 5]}, 3, (4, 5)),
        ({"shape": np.array([4, 5])}, 3, (4, 5)),
        ({"shape": torch.Size([4, 5])}, 3, (4, 5)),
        ({"path": Path("b")}, 5, Path("b")),
        ({"anything": object}, 7, object),
        ({"width": np.int64(3)}, 8, {"width": 3}),
    ],
)
def test_values_of_the_annotated_kind_become_pythons_own(arguments, place, converted):
    found = function(**arguments)[place]
    assert found == converted
    assert type(found) is type(converted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, r"expected count to be a positive integer, got 0\.$"),
        ({"count": True}, "count to be a positive integer, got True"),
        ({"count": 2.0}, r"count to be a positive integer, got 2\.0"),
        ({"count": torch.tensor(2.5)}, r"got a tensor of shape \(\), torch.float32, on cpu"),
        ({"number": "1"}, "got '1'"),
        ({"number": 10**400}, "got 10000"),
        ({"flag": 2}, "flag to be True or False, got 2"),
        ({"shape": 4}, r"a sequence of one or more positive integers, got 4\. Write \(4,\)"),
        ({"shape": ()}, r"one or more positive integers, got \(\)"),
        ({"shape": "45"}, "got '45'"),
        ({"shape": {4}}, r"got \{4\}"),
        (
            {"x": np.zeros(3)},
            r"x to be a dense tensor or None, got an ndarray\. Pass torch.as_tensor\(x\)",
        ),
        ({"x": pd.DataFrame({"a": [0.0]})}, r"Pass torch.tensor\(x.to_numpy\(\), dtype=torch.float32\)"),
        ({"x": torch.zeros(3).to_sparse()}, r"got a torch.sparse_coo tensor of shape \(3,\).*Pass x.to_dense\(\)"),
        ({"path": b"a"}, "path to be a path, got b'a'"),
        ({"path": ""}, "got ''"),
        ({"path": "a\0b"}, "path to be a path"),
        ({"module": nn.Linear}, "module to be a torch.nn.Module or None, got .*Pass an instance of it"),
        ({"width": -1}, "width to be a positive integer, got -1"),
    ],
)
def test_values_of_another_kind_are_refused(arguments, message):
    with pytest.raises(pv.PyroVAEError, match=message):
        function(**arguments)


NAN = torch.full((6, 4), torch.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.likelihood.check(3.0), r"expected x to be a dense tensor, got 3\.0"),
        (lambda vae: vae.likelihood.check((NAN, NAN)), "expected x to be a dense tensor, got a tuple"),
        (lambda vae: vae.likelihood(NAN[:, :2]), "a distribution has invalid parameters"),
        (lambda vae: vae.posterior(NAN), "a distribution has invalid parameters"),
        (lambda vae: pv.VampPrior(vae.posterior, NAN)(), "a distribution has invalid parameters"),
        (
            lambda vae: pv.log_likelihood(vae, ([[0.0] * 4] * 6,)),
            "x to be a dense tensor, or a tuple of them, got a list",
        ),
    ],
)
def test_parts_and_evaluations_refuse_what_is_no_tensor_and_nan(call, message):
    with pytest.raises(pv.PyroVAEError, match=message):
        call(pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,)))


def test_a_number_that_is_trained_stays_a_tensor():
    beta = torch.tensor(0.5, requires_grad=True)
    assert function(number=beta)[1] is beta


def test_the_first_wrong_argument_is_named():
    with pytest.raises(pv.PyroVAEError, match="expected count"):
        function(count=0, shape=4, width=-1)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_an_objective_may_define_its_reduction_in_other_ways(kind):
    class Own(pv.Objective):
        family = "own"
        reduce = kind(lambda *arguments: arguments[-1].mean(0))

    x, vae = torch.randn(6, 4), pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    assert Own(2).bound(vae, x).shape == (6,)


def test_a_network_may_be_a_function_and_a_prior_of_ones_own_model_may_take_arguments():
    class Prior(nn.Module):
        def forward(self, y):
            return torch.distributions.Normal(y, 1.0)

    class Own(pv.VAE):
        def model(self, x, y):
            return self.prior(y)

    posterior = pv.DiagonalNormal(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), (4,))
    assert posterior(torch.zeros(3, 4)).event_shape == (2,)
    Own(prior=Prior(), likelihood=pv.Gaussian(nn.Linear(2, 4), (4,)), posterior=posterior)


def test_pythons_own_errors_stay():
    with pytest.raises(TypeError, match=r"function\(\) got an unexpected keyword argument 'wdith'"):
        function(wdith=3)
    with pytest.raises(TypeError, match=r"function\(\) too many positional arguments"):
        function(*range(9))


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Seed, "an integer from 0 to 4,294,967,295"),
        (Annotated[float, Between(0)], "a number of at least 0"),
        (Annotated[Sequence[Count], Between(3, 3)], "a sequence of 3 positive integers"),
        (Literal["a", "b"], "a string"),
        (Mapping[str, Any], "a dictionary"),
    ],
)
def test_the_words_for_an_annotation(hint, words):
    assert kind_of(hint).words == words


def test_sizes_beyond_all_memory_are_refused():
    with pytest.raises(pv.PyroVAEError, match="expected sizes that fit into memory, got more in mlp"):
        networks.mlp(4, (10**12,), 3)


def test_random_calls_end_in_a_right_number_or_a_refusal():
    assert [(call.source, result) for call, kind, result in faults(seed=1, calls=150) if kind == "fault"] == []


@pytest.mark.slow
def test_two_thousand_random_calls():
    assert [(call.source, result) for call, kind, result in faults(seed=2, calls=2_000) if kind == "fault"] == []
