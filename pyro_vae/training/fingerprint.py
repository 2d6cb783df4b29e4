"""What a checkpoint keeps of a program, its data and its schedules, to recognise them when training goes on.

Families and constants of a program are seen in the log-density of each site, on a few rows of data and at latents that
are kept too, under the parameters of the same checkpoint. Data are seen in sums, schedules in their values.
"""

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.engine import precision, rng
from pyro_vae.engine.minibatches import Batch, Minibatches
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Site, Sites, family, labelled
from pyro_vae.engine.traces import At, sample_sites
from pyro_vae.errors import PyroVAEError
from pyro_vae.training import data_sums, schedule_values

FEW = 4  # rows on which a program is compared, unless it takes no other number than that of a minibatch
PASS_THE_SAME = "Pass the same again to continue that training, or pass a new path."


@dataclass
class Fingerprint:
    """What identifies a training beyond its settings."""

    program: Program  # on the rows that the checkpoint keeps
    latents: dict[str, Tensor] | None  # at which its densities are compared; None if they can't be
    parameters: dict[str, Tensor]
    fixed: dict[str, Any]  # what does not depend on the parameters
    epochs_seen: int = 0
    repeats: bool | None = None  # whether each epoch begins with the rows of the first minibatch; None is not known

    @classmethod
    def of(
        cls,
        program: Program,
        parameters: dict[str, Tensor],
        batches: Minibatches,
        held_out: Minibatches | None,
        schedules: dict[str, schedule_values.Values],
    ) -> "Fingerprint":
        """That of a training which is about to begin, or to go on; nothing else notices the runs of the program."""
        fixed = {
            "data": data_sums.describe(batches),
            "validation": None if held_out is None else data_sums.describe(held_out),
            "schedules": schedules,
        }
        why = "its minibatches hold more than tensors and plain Python values"
        for rows in (_few(program.args), _copied(program.args)):
            on_rows = program.on(rows)
            try:
                latents = _draw(on_rows)
                _densities(on_rows, latents, seed=0)
            except Exception as error:  # such as a program whose plate has the size of a minibatch, on fewer rows
                why = f"it does not run again on its first minibatch and the latents of a run ({error})"
                continue
            if _is_plain((rows, latents)):
                return cls(on_rows, latents, parameters, fixed)
        warnings.warn(
            f"a checkpoint can't tell this program from another with the same parameters: {why}. When training goes "
            "on, pass the program that was trained.",
            stacklevel=6,
        )
        return cls(program, None, parameters, fixed)

    def state(self) -> dict[str, Any]:
        """The part of the checkpoint, under the present parameters."""
        state = self.fixed | {"repeats": self.repeats, "precision": self._precision()}
        if self.latents is None:
            return state
        # What differs between two runs at the same latents, such as dropout that is always on, can't be compared later.
        try:
            first, second = (_densities(self.program, self.latents, seed) for seed in (0, 1))
        except Exception as error:  # the latents are those of other parameters; training must not end here
            warnings.warn(
                "the checkpoint can't tell this program from another with the same parameters: it does not run at the "
                f"latents of its first run any more ({error}). When training goes on, pass the program that was "
                "trained.",
                stacklevel=2,
            )
            return state
        sites = {
            name: site
            if name in second and _same(site, second[name], self._precision() / 4)
            else site | {"value": None}
            for name, site in first.items()
        }
        return state | {
            "rows": list(self.program.args),
            "latents": self.latents,
            "sites": sites,
            "same_sites": first.keys() == second.keys(),
        }

    def see_first(self, batch: Batch) -> None:
        """Look at the first minibatch of an epoch."""
        # The first epoch may begin with the state of the random number generators in which the program was looked at.
        if self.epochs_seen and self.latents is not None:
            own = self.program.args
            same = _equal(_few(batch) if _length(own) < _length(batch) else batch, own)
            self.repeats = self.repeats is not False and same
        self.epochs_seen += 1

    def check_inputs(self, path: str | Path, saved: dict[str, Any]) -> None:
        """Refuse other data, or another schedule, than those of the checkpoint."""
        for what in ("data", "validation"):
            was, now = saved[what], self.fixed[what]
            if (was is None) != (now is None):
                with_, got = ("without", "some") if was is None else ("with", "none")
                raise PyroVAEError(
                    f"the checkpoint {path} was written {with_} validation data: expected "
                    f"{'none' if was is None else 'the same'}, got {got}. {PASS_THE_SAME}"
                )
            found = None if was is None or now is None else data_sums.difference(was, now)
            if found is not None:
                words = "data" if what == "data" else "validation data"
                raise PyroVAEError(
                    f"the checkpoint {path} was written with other {words}: expected {found.what} to be {found.was}, "
                    f"got {found.now}. {PASS_THE_SAME}"
                )
        self.repeats = saved["repeats"]
        rows = tuple(saved["rows"]) if self.repeats and "rows" in saved else self.program.args
        if (
            self.latents is not None
            and _length(rows) == _length(self.program.args)
            and not _equal(rows, self.program.args)
        ):
            raise PyroVAEError(
                f"the checkpoint {path} was written with other data: expected the first minibatch to begin with the "
                f"rows that the checkpoint keeps, got others. {PASS_THE_SAME}"
            )
        for name in sorted(saved["schedules"].keys() | self.fixed["schedules"].keys()):
            was, now = (kept.get(name, {}) for kept in (saved["schedules"], self.fixed["schedules"]))
            at = schedule_values.difference(was, now)
            if at is not None:
                place = f"epoch {at}" if name == "lr" else f"step {at}"
                if name != "lr" and (steps := self.fixed["data"]["minibatches"]):
                    place += f" (epoch {at // steps + 1})"
                raise PyroVAEError(
                    f"the checkpoint {path} was written with another schedule of {name}: expected {name} to be "
                    f"{was[at]:.6g} at {place}, got {now[at]:.6g}. {PASS_THE_SAME}"
                )

    def check_program(self, path: str | Path, saved: dict[str, Any]) -> None:
        """Refuse a program with other log-densities than the checkpoint's, under the parameters of the checkpoint."""
        if "sites" not in saved:
            return
        rows, latents = self._here(saved)
        of_another = f"the checkpoint {path} is of another program"
        build = "Build the program that was trained, or pass another path."
        try:
            own = _densities(self.program.on(rows), latents, seed=0)
        except Exception as error:
            raise PyroVAEError(
                f"{of_another}: expected one that runs on the rows and at the latents which the checkpoint keeps, got "
                f"{type(error).__name__}: {error}. {build}"
            ) from error
        rounding = max(saved["precision"], self._precision())
        for name in [*saved["sites"], *own]:
            was, now = saved["sites"].get(name), own.get(name)
            if was is None:
                if saved["same_sites"]:
                    raise PyroVAEError(f"{of_another}: expected no {name}, got one ({own[name]['family']}). {build}")
            elif was["value"] is None:
                continue
            elif now is None:
                raise PyroVAEError(f"{of_another}: expected a {name} ({was['family']}), got none. {build}")
            elif not _same(was, now, rounding):
                raise PyroVAEError(f"{of_another}: expected {name} {_difference(was, now, rounding)}. {build}")

    def _here(self, saved: dict[str, Any]) -> tuple[Batch, dict[str, Tensor]]:
        """The rows and latents of the checkpoint, on the devices of this training."""
        default = next(iter(self.parameters.values())).device

        def beside(value: Any, own: Any) -> Any:
            device = next((v.device for v in pytree.tree_leaves(own) if isinstance(v, Tensor)), default)
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

        args = self.program.args
        rows = tuple(beside(value, args[i] if i < len(args) else None) for i, value in enumerate(saved["rows"]))
        return rows, {name: beside(value, (self.latents or {}).get(name)) for name, value in saved["latents"].items()}

    def _precision(self) -> float:
        """The rounding of the program's arithmetic, relative: of its least precise part."""
        values = list(self.parameters.values())
        types = {v.dtype for v in values if v.is_floating_point()} | {d for _, d in precision.autocast_of_layers()}
        found = [torch.finfo(dtype).eps for dtype in types]
        if any(v.is_cuda for v in values):
            found.append(2.0**-10)  # TF32, which convolutions take by default
        if torch.get_float32_matmul_precision() != "highest":
            found.append(torch.finfo(torch.bfloat16).eps)
        return max(found, default=0.0)


def _few(args: Batch) -> Batch:
    """The first rows of a minibatch, in memory of their own."""
    length = _length(args)
    rows = (v[:FEW] if isinstance(v, Tensor) and v.dim() and len(v) == length else v for v in args)
    return _copied(tuple(rows))


def _length(args: Batch) -> int:
    return len(args[0]) if isinstance(args[0], Tensor) and args[0].dim() else 0


def _copied(args: Batch) -> Batch:
    return tuple(pytree.tree_map_only(Tensor, _copy, arg) for arg in args)


def _copy(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, of no subclass, which a checkpoint could not hold."""
    return tensor.detach().clone().as_subclass(Tensor)


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold it, and be read without running code."""
    if isinstance(value, dict):
        return type(value) is dict and _is_plain(list(value)) and _is_plain(list(value.values()))
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)


def _equal(first: Batch, second: Batch) -> bool:
    """Whether two minibatches are the same, up to the rounding of the processor that prepared them."""
    leaves = [pytree.tree_leaves(batch) for batch in (first, second)]
    if len(leaves[0]) != len(leaves[1]):
        return False
    for a, b in zip(*leaves, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a.cpu(), b.cpu(), equal_nan=True):
            return False
    return True


def _draw(program: Program) -> dict[str, Tensor]:
    """All that one run of the guide, and of the model against it, draws; also the rows that a plate subsamples."""
    with rng.preserved(seed=0):
        traces = program.trace()
    return {
        name: _copy(site["value"])
        for trace in reversed(traces)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and isinstance(site["value"], Tensor)
    }


def _densities(program: Program, latents: dict[str, Tensor], seed: int) -> dict[str, dict[str, Any]]:
    """The log-density of each site at given latents, by the words that an error message calls the site."""
    model: Any = At(latents)(program.model)  # for latents that the guide lacks
    with (
        rng.preserved(seed),
        program.unnoticed(),
        pyro.distributions.validation_enabled(False),
    ):
        traces = replace(program, model=model).trace(latents)
        sites = labelled(*(_with_densities(trace) for trace in traces))
        return {name: _described(site) for name, site in sites.items()}


def _with_densities(trace: Any) -> Sites:
    try:
        return sample_sites(trace)
    except (NotImplementedError, KeyError):  # a flow without an inverse has no density at a given value
        return sample_sites(trace, latent=False)


def _described(site: Site) -> dict[str, Any]:
    """A site's family, its log-densities, masked and scaled, and the size of the terms that they are sums of."""
    value = site.get("log_prob")
    scale = torch.as_tensor(site["scale"]).abs().max().item()
    return {
        "family": family(site["fn"]),
        "value": None if value is None else _copy(value).cpu(),
        "size": scale * math.prod(site["fn"].event_shape),
    }


def _same(was: dict[str, Any], now: dict[str, Any], rounding: float) -> bool:
    """Whether two log-densities of a site agree in half of their digits.

    That leaves room for another processor. Each element of an event has a term of order 1 at least, before they cancel.
    """
    first, second = was["value"], now["value"]
    if first is None or second is None:
        return first is second
    if first.shape != second.shape:
        return False
    return not bool(_apart(was, now, rounding).any())


def _apart(was: dict[str, Any], now: dict[str, Any], rounding: float) -> Tensor:
    first, second = was["value"], now["value"]
    tolerance = math.sqrt(max(rounding, torch.finfo(first.dtype).eps))
    bound = tolerance * (first.abs() + was["size"])
    alike = (first == second) | (first.isnan() & second.isnan()) | ((first - second).abs() <= bound)
    return ~alike | (first.isinf() != second.isinf())


def _difference(was: dict[str, Any], now: dict[str, Any], rounding: float) -> str:
    """What a message says of a site with other log-densities."""
    families = f"({was['family']})", f"({now['family']})"
    first, second = was["value"], now["value"]
    if second is None:
        return f"{families[0]} to have a log-density at a given value, got none {families[1]}"
    if first.shape != second.shape:
        shapes = tuple(first.shape), tuple(second.shape)
        return f"{families[0]} to have log-densities of shape {shapes[0]}, got {shapes[1]} {families[1]}"
    at = int(_apart(was, now, rounding).flatten().nonzero()[0])
    values = first.flatten()[at].item(), second.flatten()[at].item()
    return (
        f"{families[0]} to have a log-density of {values[0]:.6g} on the data and latents that the checkpoint keeps, "
        f"got {values[1]:.6g} {families[1]}"
    )
