"""The first run of a training's program: what it finds, and what refuses minibatches that don't add up."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_vae.engine.first_run import refusal
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.parameters import require_parameters
from pyro_vae.engine.program import Program
from pyro_vae.engine.row_parameters import check_row_parameters, trial
from pyro_vae.engine.rows import Rows, find_rows
from pyro_vae.engine.sites import Sites, particle_dim_of, plates, size_of
from pyro_vae.engine.traces import sample_sites
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import Objective
from pyro_vae.training.scales import Fitted, joined, likelihoods_in


def first_run(
    program: Program, objective: Any, batches: Minibatches
) -> tuple[dict[str, Tensor], Sites, list[Fitted], Rows]:
    """Run the program once; return its parameters, the model's sites, its likelihoods, and what counts its data."""
    with likelihoods_in() as matched:
        traces = program.trace()
    sites = [sample_sites(trace, latent=False) for trace in traces]
    cut = len(program.args[0]) if batches.cuts_rows else None
    rows_of = find_rows(program, sites[0], cut)
    if batches.steps != 1 or batches.share is not None:  # a process's share cuts the only one, too
        _check_minibatches(sites[0], rows_of.number)
        other = batches.of_one(program.args) if cut not in (None, 1, rows_of.number) and not rows_of.full else None
        if other is not None and not rows_of.follows(other):
            raise PyroVAEError(
                f"minibatches are {cut} rows of the data's first dimension, and plate "
                f"'{getattr(rows_of.plate, 'name', None)}' has {rows_of.number} rows in each of them: expected "
                "minibatches that add up to the data. Pass the data along the first dimension (x.T, say), or "
                "batch_size=N."
            )
        if isinstance(objective, Objective) and objective.needs().per_datum:
            _check_outermost(sites, rows_of)
    if isinstance(objective, Objective):  # before other runs, since a flow keeps the history of its last draw alone
        needs, nesting = objective.needs(), -particle_dim_of(*sites) - 1
        objective.remember(replace(program, needs=needs, nesting=nesting), traces)
    if batches.moves_rows:
        check_row_parameters(program, trial(program, rows_of.number))
    # The optimiser's state in a checkpoint has the parameters by their order.
    return dict(sorted(require_parameters(*traces).items())), sites[0], joined(matched(sites[0])), rows_of


def _check_minibatches(model: Sites, size: int) -> None:
    """Refuse a program with a term outside the data's plate, which would count once for each minibatch."""
    frames = {name: site["cond_indep_stack"] for name, site in model.items()}
    if any(frame.full_size != frame.size for stack in frames.values() for frame in stack):
        return  # scaled to all data: each minibatch's loss estimates the whole
    for name, stack in frames.items():
        if size not in [size_of(plate, model[name]) for plate in stack]:
            raise PyroVAEError(
                f"expected a program whose minibatches add up to the data, got model site '{name}' outside the data's "
                f"plate of size {size}: its term would count once for each minibatch. Move it inside; or give the "
                "plate the size of all data, pyro.plate('data', N, subsample_size=len(x)); or pass batch_size=N."
            )


def _check_outermost(sites: list[Sites], rows: Rows) -> None:
    """Refuse a program whose minibatches are cut from another plate than the outermost, whose rows are bounded."""
    stacks = [plates(site) for group in sites for site in group.values()]
    if not stacks:  # the first step refuses a program without sites
        return
    first, *others = stacks
    outermost = next((plate for plate in first if all(plate in stack for stack in others)), None)
    if outermost and rows.plate and outermost.name != rows.plate.name:
        raise PyroVAEError(
            f"the outermost plate '{outermost.name}' has {outermost.size} rows, and minibatches are cut from the "
            f"{rows.number} rows of plate '{rows.plate.name}': expected the data's plate to be the outermost one, "
            f"whose rows have log-weights of their own. Enter it first: pyro.plate('{rows.plate.name}', ..., dim=-2)."
        )


def check_columns(model: PyroFunction, held_out: Minibatches) -> None:
    """Refuse validation data that the model does not take as its arguments."""
    if held_out.loader is None:
        error = refusal(model, held_out.example())
        if error is not None:
            raise PyroVAEError(
                "expected validation data that the model takes as its arguments, got a tuple of "
                f"{len(held_out.columns)} ({error}). Pass validation data of the form of the training data."
            ) from error
