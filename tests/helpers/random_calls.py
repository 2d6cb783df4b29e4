"""Random calls of the public functions, each one line of source that reproduces itself, and how each ends.

    python -m tests.helpers.random_calls SEED CALLS

draws arguments by their names, a fifth of them wrong. It prints how the calls end, and every fault: an error that is
neither a refusal of this package nor Python's own about the call; a refusal although every argument is right; a result
that is not finite, or not the exact one.
"""

from __future__ import annotations

import collections
import math
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import networks

PACKAGE = str(Path(pv.__file__).parent)
N, D, Z = 6, 4, 2
NAN, INF = math.nan, math.inf
WEIGHTS = torch.linspace(-1, 1, Z * D).reshape(Z, D)


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS, 1.0).to_event(1), obs=x)


def guide(x: torch.Tensor) -> None:
    precision = torch.eye(Z) + WEIGHTS @ WEIGHTS.T
    scale = pyro.param("scale", torch.tensor(1.1))
    with pyro.plate("data", len(x)):
        mean = torch.linalg.solve(precision, WEIGHTS @ x.T).T
        pyro.sample("z", dist.Normal(mean, scale * precision.inverse().diagonal().sqrt()).to_event(1))


def other_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(torch.zeros(Z), 1.0).to_event(1))


def log_p(x: torch.Tensor) -> torch.Tensor:
    """The model's exact log p(x) of each datum."""
    return dist.MultivariateNormal(torch.zeros(D), torch.eye(D) + WEIGHTS.T @ WEIGHTS).log_prob(x)


def vae(**options: Any) -> pv.VAE:
    return pv.mlp_vae((D,), latent_dim=Z, hidden_dims=(5,), **({"likelihood": "gaussian"} | options))


def both(pair: pv.VAE) -> tuple[Any, Any]:
    return pair.model, pair.guide


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape)


def image_vae() -> pv.VAE:
    """A pair for images of `grey`."""
    return pv.mlp_vae((1, 6, 6), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")


# For each name in a call: what is right there, and what is wrong or odd.
POOLS: dict[str, tuple[str, str]] = {
    "program": (
        "model, guide; (model, guide); vae(); vae(scale='learned'); vae(posterior=pv.FullNormal); "
        "vae(prior=pv.MixturePrior(2, 3)); vae(likelihood='student_t'); vae(likelihood='low_rank_gaussian')",
        "model; guide, model; model, None; None, guide; 'model', 'guide'; 3; pv.VAE; vae(), vae(); "
        "lambda: None, lambda: None; model, other_guide; model, vae().guide; vae().prior; [model, guide]; "
        "vae(prior=pv.StandardNormal(3)); vae().double(); vae().half(); torch.nn.Linear(4, 2), guide",
    ),
    "x": (
        "torch.randn(6, 4); torch.randn(6, 4) * 3; torch.zeros(6, 4); torch.randn(4, 6).T",
        "torch.randn(6, 5); torch.randn(7, 4); torch.randn(4); torch.tensor(1.0); torch.randn(0, 4); "
        "torch.randn(6, 2, 2); torch.randn(6, 4).double(); torch.randn(6, 4).half(); "
        "torch.ones(6, 4).long(); torch.ones(6, 4) > 0; torch.full((6, 4), NAN); torch.full((6, 4), INF); "
        "torch.full((6, 4), 1e15); np.zeros((6, 4)); pd.DataFrame(np.zeros((6, 4))); [[0.0] * 4] * 6; 'x'; "
        "None; 3.0; {}; object(); torch.Tensor; torch.randn(6, 4).to_sparse(); "
        "torch.randn(6, 4, device='meta'); torch.randn(6, 4) * 1j; (); (torch.randn(6, 4), torch.zeros(5)); "
        "DataLoader(torch.randn(6, 4), batch_size=4); iter([1]); "
        "torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]); TensorDataset(torch.randn(6, 4))",
    ),
    "data": (
        "torch.randn(6, 4); (torch.randn(6, 4),); DataLoader(torch.randn(6, 4), batch_size=4); "
        "torch.randn(6, 4).numpy(); {'x': torch.randn(6, 4)}; "
        "DataLoader([{'x': row, 'y': 1} for row in torch.randn(6, 4)], batch_size=4, collate_fn=pv.data.collate('x'))",
        "torch.randn(6, 5); torch.randn(0, 4); DataLoader(torch.randn(2, 4), batch_size=4, drop_last=True); "
        "torch.full((6, 4), NAN); np.zeros((6, 4)); None; 'x'; []; torch.tensor(1.0); iter([1]); "
        "DataLoader([{'x': torch.zeros(4)}] * 6); torch.randn(6, 4).to_sparse(); "
        "TensorDataset(torch.randn(6, 4)); (torch.randn(6, 4), torch.zeros(5)); "
        "torch.randn(6, 4, device='meta'); [torch.zeros(4)] * 6",
    ),
    "objective": (
        "pv.ELBO(kl='monte_carlo'); pv.ELBO(2, 'monte_carlo', 'stl'); pv.IWAE(3); pv.IWAE(4, 'dreg'); "
        "pv.MIWAE(2, 3); pv.PIWAE(2, 3); pv.CIWAE(0.5, 3); pv.TVO(3); pv.JVI(3); pv.RWS(3); "
        "pv.Renyi(0.5, 3); pv.IWAE(4, chunk_size=2); pv.IWAE(3, vectorize_particles=False)",
        "pv.ELBO; None; 'elbo'; torch.nn.MSELoss(); pv.ELBO(beta=lambda: 1); pv.ELBO(beta=lambda s: NAN); "
        "pv.ELBO(beta=lambda s: 'a'); pv.IWAE(3, max_plate_nesting=0); {}; [pv.ELBO()]",
    ),
    "count": (
        "2; 3; np.int64(3); torch.tensor(3)",
        "0; -1; 2.0; True; None; '3'; NAN; INF; [3]; 1j; np.float64(3); torch.tensor(2.5)",
    ),
    "many": (
        "30; 40; np.int32(30)",
        "1; 0; -1; 30.0; None; '30'; NAN; True; (30,)",
    ),
    "number": (
        "0.5; np.float32(0.5); torch.tensor(0.5)",
        "NAN; -INF; -1.0; None; 'a'; True; [0.5]; 1j; 10**400; torch.zeros(2)",
    ),
    "shape": (
        "(4,); [4]; torch.Size([4]); np.array([4]); range(4, 5)",
        "(); 4; None; '4'; (0,); (-4,); (4.0,); (True,); {4}; (None,); (10**12,); (NAN,)",
    ),
    "columns": ("'x'; 'x', 'mask'; 0; 0, 1", "None; 1.5; 'x', 0; [0]; True"),
    "functions": (
        "model, guide; *both(vae())",
        "vae().model, guide; model, other_guide; None, None; 3, 4",
    ),
    "size": (
        "2; 3; np.int64(3); None",
        "0; -1; 2.0; '3'; [3]",
    ),
    "hidden": (
        "(5,); [5, 3]",
        "(); 5; None; '5'; (0,); (2.5,); (10**12,); {5: 5}",
    ),
    "image": (
        "(1, 6, 6); [1, 6, 6]; (3, 7, 6)",
        "(6, 6); 36; None; (1, 0, 6); (1, 6, '6'); ()",
    ),
    "seed": (
        "0; 7; None; np.int64(3)",
        "-1; 1.5; 'a'; 2**40; True; [0]; torch.tensor(1.5)",
    ),
    "likelihood": (
        "'gaussian'; 'student_t'; 'poisson'; pv.Bernoulli",
        "None; ''; 'normal'; 3; dist.Normal",
    ),
    "posterior": (
        "pv.DiagonalNormal; pv.FullNormal",
        "None; 'normal'; pv.VAE; torch.nn.Linear; vae().posterior",
    ),
    "prior": (
        "None; pv.StandardNormal(2); pv.MixturePrior(2, 3)",
        "pv.StandardNormal; 'normal'; dist.Normal(0.0, 1.0); torch.nn.Linear(2, 2); 3; pv.StandardNormal(3)",
    ),
    "module": (
        "pv.StandardNormal(2); pv.MixturePrior(2, 3)",
        "None; pv.StandardNormal; 3; torch.nn.Linear(2, 2); pv.StandardNormal(3)",
    ),
    "network": (
        "networks.mlp(4, [5], 4); torch.nn.Linear(4, 4)",
        "None; torch.nn.Linear; lambda x: x; 3; networks.mlp(3, [5], 4); networks.mlp(4, [5], 5)",
    ),
    "decoder": (
        "torch.nn.Linear(2, 4); networks.mlp(2, [5], 4)",
        "None; 3; torch.nn.Linear(2, 5); torch.nn.Linear(3, 4)",
    ),
    "z": (
        "torch.randn(3, 2); torch.randn(5, 3, 2)",
        "torch.randn(3, 3); torch.tensor(1.0); None; np.zeros((3, 2)); torch.ones(3, 2).long(); "
        "[[0.0, 0.0]]; torch.randn(3, 2).double(); torch.randn(3, 2, device='meta'); torch.full((3, 2), NAN)",
    ),
    "points": (
        "torch.randn(3, 2); np.zeros((3, 2))",
        "torch.randn(3, 3); None; 'z'; torch.zeros(2)",
    ),
    "log_weights": (
        "torch.randn(6, 4); torch.ones(6, 4); torch.randn(6, 4).double()",
        "torch.randn(30); torch.randn(0, 4); None; [[0.0]]; torch.ones(30, 4).long(); torch.randn(2, 3, 4); "
        "torch.randn(30, 4).to_sparse(); np.zeros((30, 4)); torch.randn(30, 4) * 1j",
    ),
    "mask": (
        "torch.ones(6, 4) > 0; torch.arange(24).reshape(6, 4) % 5 > 0",
        "torch.ones(6, 4); True; torch.ones(5, 4) > 0; np.ones((6, 4), bool)",
    ),
    "pixels": (
        "images(5, 1, 6, 6); images(5, 6, 6); images(5, 3, 6, 6); np.zeros((5, 6, 6))",
        "images(5, 36); None; 'img'; images(0, 1, 6, 6); images(5, 1, 6, 6).to_sparse(); 3.0; "
        "[[0.1], [0.2, 0.3]]; images(5, 2, 6, 6); images(5, 1, 6, 6) * 1j; "
        "torch.rand(5, 1, 6, 6, device='meta'); 255 * torch.ones(2, 6, 6).long()",
    ),
    "grey": ("images(5, 1, 6, 6)", "None; 'img'; np.zeros((5, 6, 6)); 3.0; images(5, 1, 6, 6).to_sparse()"),
    "table": (
        "fitted",
        "None; {}; 'a'; pd.DataFrame(); fitted.iloc[:0]; fitted.astype(str); np.zeros(3)",
    ),
    "function": (
        "'z'; 'x'; torch.square; lambda z: z > 0; lambda z: z[..., 0]; lambda z: torch.ones(*z.shape[:2], 3, 2)",
        "None; 3; 'a'; lambda z: z.mean(); lambda z: z / 0; lambda: 1; lambda z: 'a'; lambda z: z * 1j; torch.nn.ReLU",
    ),
    "ranks": (
        "pv.calibrate(vae(), torch.zeros(6, 4), 3, progress=False).ranks",
        "fitted; None; 3; pd.DataFrame(); torch.rand(6, 2)",
    ),
    "path": (
        "path('a.pt')",
        "3; None; ''; b'x'; '/'; '/nowhere/a.pt'; 'a\\0b'; path('.'); path('text')",
    ),
    "written": (
        "path('good')",
        "path('a.pt'); path('text'); 3; None; ''; b'x'; path('.'); '/'",
    ),
    "flag": (
        "True; False",
        "None; 2; 'yes'",
    ),
    "values": (
        "torch.randn(5); torch.randn(5).double(); torch.arange(3)",
        "torch.randn(3, 3); torch.randn(0); None; [1.0, 2.0]; np.zeros(4); torch.zeros(2) * 1j",
    ),
    "extent": (
        "(-3, 3, -3, 3)",
        "(3, -3, -3, 3); 3; None; (1, 2, 3); (NAN, 1, 0, 1); (-INF, INF, -1, 1); 'abcd'",
    ),
    "observed": (
        "None; torch.ones(6, 4) > 0",
        "torch.ones(6, 4); True; torch.ones(5, 4) > 0; np.ones((6, 4), bool)",
    ),
}

CALLS: list[tuple[int, str]] = [
    (6, "pv.log_likelihood({program}, {x}, {many}, seed={seed})"),
    (4, "pv.log_likelihood({program}, {x}, {many}, vectorize_particles={flag})"),
    (6, "pv.log_weights({program}, {x}, num_particles={count})"),
    (10, "{objective}.bound({program}, {x})"),
    (8, "{objective}.differentiable_loss({program}, {x})"),
    (4, "{objective}.loss_and_grads({program}, {x})"),
    (6, "{objective}.reduce({log_weights})"),
    (4, "pv.IWAE(6).reduce(w := {log_weights}) - w.logsumexp(0) + math.log(len(w))"),
    (3, "{objective}.curvature({log_weights})"),
    (8, "pv.fit({program}, {data}, {objective}, epochs={count}, lr={number}, progress=False)"),
    (5, "pv.fit({program}, {data}, {objective}, epochs=1, seed={seed}, checkpoint={path}, progress=False)"),
    (3, "pv.fit({program}, {data}, {objective}, epochs=2, validation={data}, patience={count}, progress=False)"),
    (3, "pv.compare({program}, {x}, {objective}, repeats={count}, seed={seed})"),
    (2, "pv.refine({program}, {x}, num_steps={count}, num_pilot={many}, rounds={count}).pareto_k.isnan().sum()"),
    (2, "pv.log_likelihood({program}, {x}, {many}, refine={flag}, error={number}, error_of='mean', seed={seed})"),
    (2, "pv.calibrate({program}, {x}, {count}, seed={seed}).gap"),
    (1, "pv.plots.calibration({ranks})"),
    (2, "pv.compare_models(dict(a=({program}), b=({program})), {x}, {many}, refine={flag}, claim={number}).difference"),
    (2, "pv.blame({program}, {x}, {count}, num_samples={many}, seed={seed}).share"),
    (2, "pv.expect({program}, {x}, {function}, {many}, refine={flag}, seed={seed}).value"),
    (3, "pv.ais({program}, {x}, {count}, {count}, seed={seed}, progress=False)"),
    (2, "pv.bdmc({program}, {x}, {count}, {count}, seed={seed}, progress=False)"),
    (3, "pv.inference_gaps({program}, {x}, {many}, num_steps={count}, lr={number})"),
    (3, "pv.decompose_elbo({program}, {x}, {count}, seed={seed})"),
    (3, "pv.active_units({program}, {x}, {count}, seed={seed})"),
    (3, "pv.to_arviz({program}, {x}, {count}, seed={seed})"),
    (3, "pv.load_parameters({written}, vae(), {x})"),
    (2, "pv.fit_scale(vae(scale='learned'), {x})"),
    (3, "pyro.infer.SVI({functions}, pyro.optim.Adam({{'lr': 0.01}}), loss={objective}).step({x})"),
    (8, "pv.mlp_vae({shape}, latent_dim={count}, hidden_dims={hidden}, likelihood={likelihood}).generate({count})"),
    (6, "pv.mlp_vae((4,), latent_dim=2, posterior={posterior}, prior={prior}).embed(torch.ones(6, 4))"),
    (4, "pv.conv_vae({image}, latent_dim={count}, channels={hidden}, residual_blocks={count}).generate(2)"),
    (3, "pv.mlp_conditional_vae({shape}, latent_dim={count}, label_dim={count}, hidden_dims={hidden})"),
    (3, "pv.mlp_semi_supervised_vae({shape}, latent_dim={count}, num_classes={count}, classifier_weight={number})"),
    (3, "pv.mlp_hierarchical_vae((4,), latent_dims={hidden}, likelihood={likelihood})"),
    (3, "pv.mlp_autoencoder({shape}, latent_dim={count}, hidden_dims={hidden})"),
    (4, "vae().embed({x}, {observed})"),
    (4, "vae().reconstruct({x}, {observed})"),
    (4, "vae().decode({z})"),
    (3, "vae().generate({count})"),
    (3, "vae().impute({x}, {mask}, {count})"),
    (3, "pyro.poutine.trace(vae().model).get_trace({x}, {observed}, subsample_size={size}) and None"),
    (4, "pv.Gaussian({decoder}, {shape}, scale={number}).decode({z})"),
    (2, "pv.LowRankGaussian({decoder}, {shape}, rank={count}).decode({z})"),
    (2, "pv.Categorical(networks.mlp(2, [], 12), {shape}, categories=3).decode({z})"),
    (3, "pv.DiagonalNormal({network}, {shape})({x}).rsample()"),
    (3, "pv.FlowPosterior(torch.nn.Linear(4, 6), {shape}, 2, length={count}, hidden_dims={hidden})({x}).rsample()"),
    (3, "pv.MixturePrior({count}, {count})().sample()"),
    (2, "pv.FlowPrior({count}, length={count}, hidden_dims={hidden})().sample()"),
    (2, "pv.VampPrior(vae().posterior, {x})().sample()"),
    (2, "pv.VAE(prior={module}, likelihood=vae().likelihood, posterior=vae().posterior).embed(torch.zeros(6, 4))"),
    (4, "pv.IWAE({count}, chunk_size={count})"),
    (3, "pv.ELBO({count}, beta={number}, free_bits={number})"),
    (2, "pv.Renyi({number}, {count})"),
    (2, "pv.TVO({count}, partitions={count}, max_plate_nesting={count})"),
    (2, "pv.schedules.warm_up({count}, start={number}, stop={number})({count})"),
    (2, "pv.schedules.cyclical({count}, cycles={count}, ramp={number})({count})"),
    (3, "str(pv.Estimate.of({values}))"),
    (2, "pv.Estimate(1.0, 0.1).interval({number})"),
    (3, "pv.pareto_k({log_weights}) is None"),
    (3, "networks.mlp({count}, {hidden}, {count})"),
    (3, "networks.conv_encoder({image}, {hidden}, {count})"),
    (2, "networks.conv_decoder({count}, {hidden}, {count}, {image})"),
    (2, "networks.apply_batched({network}, {x}, 1)"),
    (3, "pv.plots.images({pixels}, columns={count})"),
    (2, "pv.plots.reconstructions(x := {pixels}, x)"),
    (2, "pv.plots.traversal(image_vae(), {grey}, start={count}, rows={count}, columns={count})"),
    (2, "pv.plots.interpolation(image_vae(), {grey}, {grey}, columns={count})"),
    (2, "pv.plots.latent_space({points})"),
    (2, "pv.plots.latent_grid(images(3, 3, 6, 6), extent={extent})"),
    (2, "pv.plots.training_curve({table})"),
    (2, "pv.plots.pareto_k({values})"),
    (1, "pv.data.collate({columns})"),
    (2, "pv.active_units({program}, {data}, {count})"),
    (2, "pv.data.load('digits', validation={count}, seed={count}).train[:3]"),
    (2, "pv.data.Split({grey}, None, dynamic={flag})[{count}]"),
]


class Call(NamedTuple):
    """One call, and whether every argument is of those that are right."""

    source: str
    right: bool


def draw(random_numbers: random.Random, wrong: float = 0.2) -> Call:
    """A call with random arguments."""
    (source,) = random_numbers.choices([call for _, call in CALLS], [weight for weight, _ in CALLS])
    right = True

    def pick(found: re.Match[str]) -> str:
        nonlocal right
        good, bad = POOLS[found[1]]
        is_wrong = random_numbers.random() < wrong
        right &= not is_wrong
        return random_numbers.choice((bad if is_wrong else good).split("; "))

    return Call(re.sub(r"(?<!\{)\{(\w+)\}", pick, source).replace("{{", "{").replace("}}", "}"), right)


def names(folder: Path) -> dict[str, Any]:
    """What the calls can name."""
    fitted = pv.fit(vae(), torch.randn(N, D), pv.ELBO(), epochs=3, checkpoint=folder / "good", progress=False)
    (folder / "text").write_text("no checkpoint")
    libraries = {"DataLoader": DataLoader, "TensorDataset": TensorDataset, "networks": networks, "np": np, "pd": pd}
    return globals() | libraries | {"fitted": fitted, "path": lambda name: folder / name}


def outcome(source: str, known: dict[str, Any]) -> tuple[str, Any]:
    """How a call ends: its result, a refusal, Python's own error about the call, or another error."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = eval(source, known)
    except pv.PyroVAEError as error:
        said = re.search(r"expect|refus|can't|no |not |needs|has ", str(error)) is not None
        return ("refused" if said else "fault", error)
    except Exception as error:
        return ("noted" if _is_said(error) else "fault"), error
    # NaN in, NaN out; and a network has differences of infinities.
    odd = "NAN" in source or (source.startswith("networks.") and "INF" in source)
    return ("result" if _is_finite(result) or odd else "fault"), result


def _is_said(error: Exception) -> bool:
    """Whether Python, or a note of ours, says which call was wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.filename.startswith(PACKAGE) for frame in frames):  # such as 'elbo'.bound
        return True
    if "to satisfy the constraint" in str(error):  # PyTorch's own refusal, of a part that is used by itself
        return True
    if isinstance(error, TypeError) and re.search(r"\(\) (got|missing|takes)", str(error)) and len(frames) <= 6:
        return True
    return (
        isinstance(error, OSError)
        or (isinstance(error, IndexError) and "expected" in str(error))
        or any("pyro_vae" in note for note in getattr(error, "__notes__", []))
    )


def _is_finite(result: Any) -> bool:
    """Whether a result has no NaN; minus infinity is the logarithm of a density that underflows."""
    if isinstance(result, torch.Tensor):
        number = result.device.type != "meta" and result.is_floating_point()
        return not number or not bool((result.isnan() | (result == INF)).any())
    if isinstance(result, float):
        return math.isfinite(result)
    if isinstance(result, tuple | list):
        return all(map(_is_finite, result))
    return not isinstance(result, pv.Estimate) or math.isfinite(result.value)


def is_exact(source: str, result: Any, known: dict[str, Any]) -> bool:
    """Whether a result is the exact one, where a second way to compute it exists: log p(x) of the model above."""
    if "logsumexp" in source:
        return float(result.abs().max()) < 1e-4
    found = re.match(r"pv\.log_likelihood\(\(?model, guide\)?, (torch.*?), [^,()]*(?:\(30\))?, \w+=", source)
    if found is None:
        return True
    pyro.set_rng_seed(0)
    exact = log_p(eval(found[1], known))
    return bool(((result.per_datum - exact).abs() < 6 * result.per_datum_error + 1e-3).all())


def faults(seed: int, calls: int) -> Iterator[tuple[Call, str, Any]]:
    """Each of so many calls with how it ends, where "fault" is what no call may do."""
    numbers = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        known = names(Path(folder))
        for _ in range(calls):
            call = draw(numbers)
            kind, result = outcome(call.source, known)
            if kind == "result" and not is_exact(call.source, result, known):
                kind = "fault"
            if kind in ("refused", "noted") and call.right:
                kind = "fault"
            yield call, kind, result
            for left in Path(folder).glob("*.pt*"):
                left.unlink()


def main() -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    for call, kind, result in faults(int(sys.argv[1]), int(sys.argv[2])):
        counts[kind] += 1
        plt.close("all")
        if kind == "fault":
            print(f"{call.source}\n    {type(result).__name__}: {str(result)[:200]}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
