"""Plots of bounds, training, diagnostics, images and latent spaces, by what they draw."""

import math
import os
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.plots.charts import APART
from pyro_vae.plots.shared import FAMILIES

CLOSED, MONTE_CARLO, IWAE = "ELBO, closed-form KL", "ELBO, Monte Carlo KL", "IWAE"
ROWS = [
    (CLOSED, 1, -104.2, 0.41),
    (MONTE_CARLO, 1, -104.3, 0.42),
    (MONTE_CARLO, 16, -104.1, 0.43),
    (IWAE, 256, -99.0, 0.38),  # out of order here, but in order in the line
    (IWAE, 1, -104.25, 0.42),
    (IWAE, 16, -101.0, 0.40),
]


LOG_P = -98.5


def bounds_table(rows=ROWS):
    columns = ["objective", "particles", "bound", "gap_se"]
    table = pd.DataFrame(rows, columns=columns).set_index(columns[:2])
    return table.assign(gap=LOG_P - table["bound"])


def history(train, validation=None):
    columns = {"train_bound": train} | ({} if validation is None else {"validation_bound": validation})
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(train) + 1, name="epoch"))


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


SCALES = torch.tensor([0.5, 0.0, 2.0])  # how much each latent of squares_vae varies over squares()


class Corners(torch.nn.Module):
    """A decoder of 2 x 2 logits: the latents, and their sum."""

    def forward(self, z):
        return torch.cat([z, z.sum(-1, keepdim=True)], -1).reshape(-1, 1, 2, 2)


class Reader(torch.nn.Module):
    """An encoder whose means are the first three pixels times `SCALES`."""

    def forward(self, x):
        return torch.cat([x.flatten(1)[:, :3] * SCALES, torch.zeros(len(x), 3)], 1)


def squares_vae():
    likelihood = pv.Gaussian(Corners(), (1, 2, 2))
    return pv.VAE(prior=pv.StandardNormal(3), likelihood=likelihood, posterior=pv.DiagonalNormal(Reader(), (1, 2, 2)))


def squares():
    return torch.rand(101, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


ONE_DIMENSION = pd.MultiIndex.from_tuples([("z", 0)], names=["site", "dimension"])
DRAW = {
    "active_units": lambda **where: plots.active_units(
        pd.DataFrame({"kl": [1.2], "kl_se": [0.1], "active": [True]}, ONE_DIMENSION), **where
    ),
    "calibration": lambda **where: plots.calibration(
        pd.DataFrame(np.linspace(0.01, 0.99, 50)[:, None], columns=ONE_DIMENSION), **where
    ),
    "models": lambda **where: plots.models(
        pd.DataFrame(
            {"log_likelihood": -98.0, "difference": 0.0, "difference_se": 0.0, "share_high_k": 0.0},
            pd.Index(["A"], name="model"),
        ),
        **where,
    ),
    "pareto_k": lambda **where: plots.pareto_k(np.zeros(3), **where),
    "bounds": lambda **where: plots.bounds(bounds_table(), **where),
    "training_curve": lambda **where: plots.training_curve(history([-150.0, -110.0]), **where),
    "images": lambda **where: plots.images(torch.rand(3, 1, 8, 8), **where),
    "latent_space": lambda **where: plots.latent_space(torch.randn(9, 2), torch.arange(9), **where),
    "latent_grid": lambda **where: plots.latent_grid(torch.rand(2, 3, 8, 8), extent=(0, 3, 0, 2), **where),
    "reconstructions": lambda **where: plots.reconstructions(*torch.rand(2, 3, 1, 8, 8), **where),
    "traversal": lambda **where: plots.traversal(squares_vae(), squares(), **where),
    "interpolation": lambda **where: plots.interpolation(squares_vae(), squares()[:2], squares()[2:4], **where),
}


@pytest.mark.parametrize("name", DRAW)
def test_axes_are_made_or_used(name):
    ax = DRAW[name]()
    assert isinstance(ax, Axes)
    assert plt.get_fignums() == [ax.figure.number]
    given = Figure().add_subplot()  # pyplot does not know this figure
    assert DRAW[name](ax=given) is given
    assert plt.get_fignums() == [ax.figure.number]
    for each in (ax, given):
        each.figure.canvas.draw()


def test_every_function_is_drawn_above():
    drawn = {name for name in plots.__all__ if name.islower()} - {"objective_colour"}
    assert drawn == DRAW.keys()


def test_what_is_no_axes_is_refused():
    with pytest.raises(pv.PyroVAEError, match=r"^expected ax to be an Axes or None, got 3\."):
        pv.plots.pareto_k(np.zeros(3), ax=3)


def test_importing_is_cheap_and_drawing_needs_no_display(tmp_path):
    script = """if True:
        import sys
        from pyro_vae import plots
        assert "matplotlib" not in sys.modules
        import torch
        plots.images(torch.rand(3, 1, 8, 8)).figure.savefig("images.png")
    """
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images.png").stat().st_size > 0


# Colours


def test_every_estimator_has_a_colour_of_its_own():
    families = [pv.ELBO(kl="analytic"), pv.ELBO(kl="monte_carlo"), pv.IWAE(2), pv.Renyi(0.5, 2), pv.MIWAE(2, 2)]
    families += [pv.PIWAE(2, 2), pv.CIWAE(0.5, 2), pv.TVO(2, 2), pv.JVI(2, 1), pv.RWS(2)]
    assert len({plots.objective_colour(objective.name) for objective in families}) == len(families)
    assert plots.objective_colour(pv.IWAE(2, "dreg").name) == plots.objective_colour(IWAE)
    known = set(FAMILIES.values())
    assert not known & {plots.objective_colour(name) for name in ("VR-max", "CUBO", "mine")}
    assert plots.objective_colour("VR-max") == "#000000"  # the same in every process


def test_colour_does_not_depend_on_the_other_rows():
    table = bounds_table([*ROWS, ("Renyi", 1, -103.0, 0.4), ("Renyi", 16, -102.0, 0.4)])
    together = plots.bounds(table)
    for name in (CLOSED, MONTE_CARLO, IWAE, "Renyi"):
        alone = plots.bounds(table.loc[[name]])
        assert line(together, name).get_color() == line(alone, name).get_color()
        assert line(alone, name).get_color() == plots.objective_colour(name)


# bounds


def test_bounds_draws_lines_in_order_of_particles_beside_each_other():
    ax = plots.bounds(bounds_table())
    np.testing.assert_allclose(np.log2(line(ax, IWAE).get_xdata()), [APART, 4 + APART, 8 + APART])
    np.testing.assert_allclose(np.log2(line(ax, MONTE_CARLO).get_xdata()), [0, 4])
    np.testing.assert_allclose(np.log2(line(ax, CLOSED).get_xdata()), [-APART])
    assert line(ax, IWAE).get_ydata().tolist() == [-104.25, -101.0, -99.0]
    assert line(ax, MONTE_CARLO).get_ydata().tolist() == [-104.3, -104.1]


def test_bounds_has_a_line_at_log_p():
    ax = plots.bounds(bounds_table())
    assert set(line(ax, "log p(x), best estimate: -98.50").get_ydata()) == {LOG_P}


def test_bounds_draws_bands_of_the_paired_errors():
    ax = plots.bounds(bounds_table())
    bands = [band.get_paths()[0].vertices for band in ax.collections if isinstance(band, PolyCollection)]
    edges = [{round(y, 9) for y in vertices[:, 1].tolist()} for vertices in bands]
    rows = {CLOSED: [(-104.2, 0.41)], MONTE_CARLO: [(-104.3, 0.42), (-104.1, 0.43)]}
    rows[IWAE] = [(-104.25, 0.42), (-101.0, 0.40), (-99.0, 0.38)]
    expected = [{round(y + sign * 1.96 * se, 9) for y, se in each for sign in (-1, 1)} for each in rows.values()]
    assert edges == expected


def test_bounds_draws_the_noise_of_one_evaluation_as_whiskers():
    table = bounds_table().assign(estimator_std=[2.0, 1.0, 0.5, 0.1, 0.4, 0.2])
    assert not [c for c in plots.bounds(table).containers if hasattr(c, "has_yerr")]  # the number of data is not known
    table.attrs["num_data"] = 400
    whiskers = [c[2][0].get_segments() for c in plots.bounds(table).containers]
    found = {
        name: [y[1] - y[0] for _, y in (segment.T for segment in each)]
        for name, each in zip("cmi", whiskers, strict=True)
    }
    np.testing.assert_allclose(found["c"], [2 * 2.0 / 20])
    np.testing.assert_allclose(found["m"], [2 * 1.0 / 20, 2 * 0.5 / 20])
    np.testing.assert_allclose(found["i"], [2 * 0.4 / 20, 2 * 0.2 / 20, 2 * 0.1 / 20])


def test_bounds_draws_a_lone_particle_count_as_a_marker_and_a_dashed_line():
    ax = plots.bounds(bounds_table())
    assert line(ax, CLOSED).get_ydata().tolist() == [-104.2]
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_ydata()) == [-104.2, -104.2]


def test_bounds_axes():
    ax = plots.bounds(bounds_table())
    assert ax.get_xscale() == "log"
    assert ax.get_xticks().tolist() == [1, 16, 256]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "16", "256"]
    assert ax.get_xticks(minor=True).size == 0
    assert ax.get_ylabel() == "bound on log p(x) (nats per datum)"


def assert_legend_is_clear(ax):
    """Check that the legend is in the figure, below the x label and the tick labels."""
    figure = ax.figure
    figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    lowest = min(text.get_window_extent().y0 for text in (ax.xaxis.label, *ax.get_xticklabels()))
    assert box.y1 <= lowest < ax.get_window_extent().y0
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("extra", [(), [("a long name of some other objective", 1, -103.0, 0.4)]])
@pytest.mark.parametrize("width", [4, 6.4])
def test_legend_is_in_the_figure_and_clear_of_the_axes_and_label(extra, width):
    figure = plt.figure(figsize=(width, 4.8), layout="constrained")
    ax = plots.bounds(bounds_table([*ROWS, *extra]), ax=figure.add_subplot())
    assert_legend_is_clear(ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["log p(x), best estimate: -98.50", CLOSED, MONTE_CARLO, IWAE, *(row[0] for row in extra)]


@pytest.mark.parametrize(
    "table",
    [
        bounds_table().drop(columns="gap_se"),
        bounds_table().reset_index(),
        bounds_table([]),
        bounds_table().rename_axis(["name", "K"]),
    ],
)
def test_bounds_refuses_another_table(table):
    with pytest.raises(
        ValueError, match=r"\['objective', 'particles'\].*'gap_se'.*Pass the return value of pv.compare\."
    ):
        plots.bounds(table)
    assert plt.get_fignums() == []


# training_curve


def test_training_curve_draws_the_history():
    ax = plots.training_curve(history([-120.0, -110.0, -105.0], [-121.0, -112.0, -109.0]))
    assert line(ax, "train").get_xdata().tolist() == [1, 2, 3]
    assert line(ax, "train").get_ydata().tolist() == [-120.0, -110.0, -105.0]
    assert line(ax, "validation").get_ydata().tolist() == [-121.0, -112.0, -109.0]
    low, high = ax.get_ylim()
    assert low < -121 and high > -105
    assert not ax.texts
    assert all(tick == int(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("validation", [None, [np.nan] * 3])
def test_training_curve_without_validation(validation):
    ax = plots.training_curve(history([-120.0, -110.0, -105.0], validation))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train"]


def test_training_curve_notes_the_epochs_below_its_axis():
    bounds = np.array([-540.0, -300.0, *np.linspace(-110, -100, 30)])
    ax = plots.training_curve(history(bounds, bounds - 1))
    low, high = ax.get_ylim()
    assert -300 < low < -111 and -100 < high < -95
    assert [text.get_text() for text in ax.texts] == ["2 epochs below the axis, down to -541 nats"]
    assert line(ax, "train").get_ydata().tolist() == bounds.tolist()  # hidden, not dropped


def test_training_curve_leaves_gaps_where_values_are_not_finite():
    ax = plots.training_curve(history([-np.inf, -110.0, np.nan, -105.0]))
    np.testing.assert_array_equal(line(ax, "train").get_ydata(), [np.nan, -110.0, np.nan, -105.0])
    assert np.isfinite(ax.get_ylim()).all()


def test_training_curve_of_several_trainings():
    a, b = history([-120.0, -110.0], [-121.0, -112.0]), history([-130.0, -115.0, -100.0])
    ax = plots.training_curve({"A": a, "B": b})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "A, validation", "B"]
    assert line(ax, "B").get_ydata().tolist() == [-130.0, -115.0, -100.0]
    assert line(ax, "A").get_color() == line(ax, "A, validation").get_color() != line(ax, "B").get_color()
    assert [each.get_linestyle() for each in ax.lines] == ["-", "--", "-"]


def test_training_curves_of_several_quantities_are_refused():
    a, b = history([-120.0]), history([-130.0])
    b.attrs["quantity"] = "objective"
    with pytest.raises(pv.PyroVAEError, match=r"of one quantity, got \['bound on log p\(x\)', 'objective'\]\. Draw"):
        plots.training_curve({"A": a, "B": b})
    with pytest.raises(pv.PyroVAEError, match="one history or more of one quantity, got none"):
        plots.training_curve({})
    with pytest.raises(pv.PyroVAEError, match="finite bound in history of 'B', got 1 epochs"):
        plots.training_curve({"A": a, "B": history([np.nan])})
    with pytest.raises(pv.PyroVAEError, match=r"expected a table, got None\. Pass the return value of pv\.fit"):
        plots.training_curve({"A": None})
    with pytest.raises(pv.PyroVAEError, match=r"expected a table, got 3\."):
        plots.training_curve(3)
    assert plt.get_fignums() == []


def test_training_curve_errors():
    with pytest.raises(ValueError, match=r"'train_bound'.*got 1 rows.*'loss'.*Pass the return value of pv.fit\."):
        plots.training_curve(history([-1.0]).rename(columns={"train_bound": "loss"}))
    with pytest.raises(ValueError, match=r"index \['epoch'\].*got 1 rows with index \[None\]"):
        plots.training_curve(history([-1.0]).reset_index())
    with pytest.raises(
        ValueError, match=r"expected at least one finite bound in history, got 2 epochs.*lower learning rate"
    ):
        plots.training_curve(history([np.nan, -np.inf]))


# images and reconstructions


def test_images_places_tiles_in_reading_order():
    x = np.random.default_rng(0).random((5, 1, 4, 6))
    drawn = plots.images(x, columns=3).images[0].get_array()
    assert drawn.shape == (4 + 1 + 4, 6 + 1 + 6 + 1 + 6)  # one pixel between tiles
    for i, (top, left) in enumerate([(0, 0), (0, 7), (0, 14), (5, 0), (5, 7)]):
        np.testing.assert_array_equal(drawn[top : top + 4, left : left + 6], x[i, 0])
    assert (drawn[4] == 1).all() and (drawn[:, 6] == 1).all()  # gaps are white
    assert (drawn[5:, 14:] == 1).all()  # and so is the empty place of a sixth tile


def test_images_draws_colour():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    drawn = plots.images(x).images[0].get_array()
    np.testing.assert_array_equal(drawn[:, :4], x[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_images_draws_any_tensor_as_its_numpy_values(dtype):
    x = torch.rand(2, 4, 4).round().to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    drawn = plots.images(x, columns=1).images[0].get_array()
    np.testing.assert_array_equal(drawn[:4], x[0].detach().double().numpy())


def test_grey_scale_is_fixed_and_values_are_clipped():
    image = plots.images(np.array([[[-0.5, 0.25], [0.5, 1.5]]])).images[0]
    assert image.get_clim() == (0, 1)
    assert image.get_array().tolist() == [[0, 0.25], [0.5, 1]]
    assert image.to_rgba([0.0])[0][0] == 0 and image.to_rgba([1.0])[0][0] == 1  # black to white
    faint = torch.linspace(0.4, 0.6, 16).reshape(1, 1, 4, 4)
    assert plots.images(faint[0]).images[0].get_clim() == (0, 1)  # for every range of the data
    assert plots.latent_grid(faint, extent=(0, 1, 0, 1)).images[0].get_clim() == (0, 1)


def test_images_has_a_title_and_no_ticks():
    ax = plots.images(torch.rand(2, 4, 4), title="samples")
    assert ax.get_title() == "samples"
    assert ax.get_xticks().size == 0 and ax.get_yticks().size == 0


def test_reconstructions_alternate_with_originals_and_are_labelled():
    x, x_mean = np.random.default_rng(1).random((2, 3, 1, 4, 4))
    ax = plots.reconstructions(torch.tensor(x), x_mean, columns=2)
    drawn = ax.images[0].get_array()
    for i, (top, left) in enumerate([(0, 0), (0, 6), (11, 0)]):  # a pair is 4 + 1 + 4 high, and the gap below it is 2
        np.testing.assert_array_equal(drawn[top : top + 4, left : left + 4], x[i, 0])
        np.testing.assert_array_equal(drawn[top + 5 : top + 9, left : left + 4], x_mean[i, 0])
    assert ax.get_yticks().tolist() == [1.5, 6.5, 12.5, 17.5]  # the middles of the four rows
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["original", "reconstruction"] * 2
    ax.figure.canvas.draw()
    assert all(label.get_window_extent().x0 >= 0 for label in ax.get_yticklabels())


@pytest.mark.parametrize("shape", [(5, 784), (5, 28, 28, 3), (0, 1, 28, 28), (28, 28)])
def test_images_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).*got shape .*Reshape.*x\.reshape\(-1, 1, 28, 28\)") as error:
        plots.images(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_image_errors():
    with pytest.raises(ValueError, match=r"expected x in \[0, 1\], got uint8 up to 200\. Divide 8-bit images by 255"):
        plots.images(np.full((1, 4, 4), 200, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected columns to be a positive integer, got 0"):
        plots.images(torch.zeros(1, 4, 4), columns=0)
    with pytest.raises(ValueError, match=r"expected x and x_mean of one shape, got \(3, 4, 4\) and \(2, 4, 4\)"):
        plots.reconstructions(torch.zeros(3, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="expected x_mean in"):
        plots.reconstructions(torch.zeros(3, 4, 4), np.full((3, 4, 4), 9))
    assert plt.get_fignums() == []


# latent_space and latent_grid


def test_latent_space_draws_each_point_in_the_colour_of_its_class():
    z, labels = torch.randn(40, 2, requires_grad=True), torch.arange(40) % 4 + 3
    ax = plots.latent_space(z, labels)
    points = ax.collections[0]
    np.testing.assert_allclose(points.get_offsets(), z.detach().numpy())
    handles = ax.get_legend().legend_handles
    colours = {handle.get_label(): to_hex(handle.get_color()) for handle in handles}
    assert list(colours) == ["3", "4", "5", "6"]
    assert len(set(colours.values())) == 4
    drawn = [to_hex(colour) for colour in points.get_facecolors()]
    assert drawn == [colours[str(int(label))] for label in labels]
    assert (ax.get_aspect(), ax.get_xlabel(), ax.get_ylabel()) == (1, "z1", "z2")


def test_latent_space_tells_twenty_classes_apart():
    z, labels = np.arange(80.0).reshape(40, 2), np.array([f"class {i:02}" for i in range(20)] * 2)
    ax = plots.latent_space(z, labels)
    handles = ax.get_legend().legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20
    circles, triangles = (points.get_offsets() for points in ax.collections)
    np.testing.assert_array_equal(circles, z[[*range(10), *range(20, 30)]])
    np.testing.assert_array_equal(triangles, z[[*range(10, 20), *range(30, 40)]])


def test_latent_space_without_labels_has_no_legend():
    ax = plots.latent_space(np.zeros((3, 2)))
    assert ax.get_legend() is None
    assert len(ax.collections[0].get_offsets()) == 3


def test_latent_space_errors():
    with pytest.raises(ValueError, match=r"expected z of shape \(N, 2\), got \(5, 8\)\. Train with latent_dim=2.*PCA"):
        plots.latent_space(torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"expected labels of shape \(5,\).*got \(4,\)"):
        plots.latent_space(torch.zeros(5, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"at most 20 classes.*got 21 classes"):
        plots.latent_space(torch.zeros(21, 2), torch.arange(21))
    assert plt.get_fignums() == []


def shade_at(ax, z1, z2):
    """Return the grey of the pixel that is drawn at a point of the latent plane."""
    ax.figure.canvas.draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[::-1]  # row 0 at the bottom, as in display coordinates
    x, y = ax.transData.transform((z1, z2))
    return pixels[int(y), int(x), 0] / 255


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_latent_grid_draws_each_tile_where_it_was_decoded(channels):
    shades = torch.arange(6.0).reshape(2, 3) / 5  # row 0 has the lowest z2
    x = shades.reshape(2, 3, *(1 for _ in channels), 1, 1).expand(2, 3, *channels, 8, 8)
    ax = plots.latent_grid(x, extent=(-3, 3, 10, 14))
    assert ax.get_xlim() == (-3, 3) and ax.get_ylim() == (10, 14)
    for row, z2 in enumerate([11, 13]):
        for column, z1 in enumerate([-2, 0, 2]):
            assert shade_at(ax, z1, z2) == pytest.approx(shades[row, column].item(), abs=0.01)


def test_latent_grid_keeps_each_image_upright():
    x = torch.zeros(2, 2, 8, 8)
    x[..., :4, :] = 1  # every image is white in its upper half
    ax = plots.latent_grid(x, extent=(0, 2, 0, 2))
    assert [shade_at(ax, 0.5, z2) for z2 in (0.25, 0.75, 1.25, 1.75)] == [0, 1, 0, 1]


def test_latent_space_over_latent_grid_keeps_the_grid_in_place():
    ax = plots.latent_grid(torch.zeros(2, 3, 8, 8), extent=(-3, 3, -2, 2))
    plots.latent_space(torch.tensor([[2.0, -1.0]]), torch.tensor([7]), ax=ax)
    assert ax.images[0].get_extent() == [-3, 3, -2, 2]
    assert ax.get_xlim() == (-3, 3) and ax.get_ylim() == (-2, 2)
    assert shade_at(ax, -2, 1) == 0  # a tile without a point
    assert to_hex(ax.collections[0].get_facecolors()[0]) == plots.BLUE.lower()
    assert shade_at(ax, 2, -1) == pytest.approx(int(plots.BLUE[1:3], 16) / 255, abs=0.01)


def test_latent_grid_errors():
    with pytest.raises(ValueError, match=r"\(rows, columns, H, W\), got \(6, 8, 8\)\. Reshape"):
        plots.latent_grid(torch.zeros(6, 8, 8), extent=(0, 1, 0, 1))
    with pytest.raises(ValueError, match="with C 1 or 3"):
        plots.latent_grid(torch.zeros(2, 3, 2, 8, 8), extent=(0, 1, 0, 1))
    with pytest.raises(ValueError, match=r"expected extent to be \(z1_min.*got \(3, -3, 0, 1\)"):
        plots.latent_grid(torch.zeros(2, 3, 8, 8), extent=(3, -3, 0, 1))
    assert plt.get_fignums() == []


def test_pareto_k_counts_every_datum():
    shapes = torch.tensor([-0.2, 0.1, 0.5, 0.69, 0.71, 1.4, math.nan, math.inf])
    ax = plots.pareto_k(shapes)
    assert sum(patch.get_height() for patch in ax.patches) == 6
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["at most 0.7: 50.0% of 8 data", "above 0.7: 37.5% of 8 data"]
    with pytest.raises(ValueError, match="at least one finite k-hat, got 3 values of NaN"):
        plots.pareto_k(torch.full((3,), math.nan))


def test_calibration_draws_a_line_for_each_dimension_and_the_band_of_uniform_ranks():
    columns = pd.MultiIndex.from_tuples([("a", 0), ("b", 0), ("b", 1)], names=["site", "dimension"])
    even = np.linspace(0, 1, 100)
    ranks = pd.DataFrame({0: even, 1: even**2, 2: 0.5 + 0 * even}).set_axis(columns, axis=1)
    ax = plots.calibration(ranks)
    uniform, low, middle = (each.get_ydata() for each in ax.lines[:3])
    assert abs(uniform).max() < 0.02
    assert low.max() == pytest.approx(0.25, abs=0.02)  # of sqrt(u) - u
    assert (middle[:100] <= 0).all()
    assert (middle[100:] >= 0).all()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["95% band of an exact guide", "a", "b"]
    for wrong in (3, ranks.iloc[:0], ranks + 1, ranks.droplevel(0, axis=1)):
        with pytest.raises(ValueError, match="expected a table of ranks from 0 to 1 by site and dimension"):
            plots.calibration(wrong)


def test_models_are_in_rows_from_the_best_one_down_hollow_where_their_estimates_are_too_low():
    rows = {"log_likelihood": [-1.0, -2.0, -3.5], "difference": [0.0, -1.0, -2.5], "difference_se": [0.0, 0.1, 0.2]}
    table = pd.DataFrame(rows | {"share_high_k": [0.0, 0.5, 0.01]}, pd.Index(["a", "b", "c"], name="model"))
    ax = plots.models(table)
    solid, hollow = (bars.lines[0] for bars in ax.containers)
    assert solid.get_xydata().tolist() == [[0, 0], [-2.5, 2]]
    assert hollow.get_xydata().tolist() == [[-1, 1]]
    assert hollow.get_markerfacecolor() == "none"
    left, right = (cap.get_xdata()[0] for cap in ax.containers[1].lines[1])
    assert (left, right) == pytest.approx((-1.196, -0.804))
    top, bottom = ax.get_ylim()[::-1]
    assert top < 0 < 2 < bottom
    with pytest.raises(ValueError, match="Pass the return value"):
        plots.models(table.reset_index())


def test_active_units_are_in_the_order_of_their_kl():
    rows = pd.MultiIndex.from_tuples([("z", 0), ("z", 1), ("z", 2)], names=["site", "dimension"])
    table = pd.DataFrame({"kl": [0.001, 2.0, 1.0], "kl_se": 0.1, "active": [False, True, True]}, index=rows)
    ax = plots.active_units(table)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "0"]
    assert sorted(round(patch.get_height(), 3) for patch in ax.patches) == [0.001, 1.0, 2.0]
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"active: 2 of 3", "inactive: 1 of 3"}
    two = table.set_axis(pd.MultiIndex.from_tuples([("a", 0), ("b", 0), ("b", 1)], names=rows.names))
    assert [label.get_text() for label in plots.active_units(two).get_xticklabels()] == ["b[0]", "b[1]", "a[0]"]
    assert_legend_is_clear(plots.active_units(two))
    long = two.rename({"a": "a_site_with_a_long_name"}, level="site")
    assert_legend_is_clear(plots.active_units(long))
    with pytest.raises(ValueError, match=r"Pass the return value of pv\.active_units\."):
        plots.active_units(table.reset_index())


def test_bounds_with_log_likelihood_between_two_numbers():
    rows = pd.MultiIndex.from_tuples([("IWAE", 1), ("IWAE", 16)], names=["objective", "particles"])
    table = pd.DataFrame({"bound": [-98.0, -95.5], "gap": [3.2, 0.7], "gap_se": [0.6, 0.6]}, index=rows)
    ax = plots.bounds(table, log_likelihood=(-95.0, -94.8))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "log p(x), between -95.00 and -94.80" in labels
    assert ax.get_ylim()[1] > -94.8


# traversal and interpolation


def tiles(ax, rows, columns):
    """The 2 x 2 tiles of a mosaic, (rows, columns, 2, 2)."""
    drawn = np.asarray(ax.images[0].get_array())
    return np.array([[drawn[3 * i : 3 * i + 2, 3 * j : 3 * j + 2] for j in range(columns)] for i in range(rows)])


def test_traversal_moves_one_dimension_in_each_row_and_the_most_active_comes_first():
    vae, x = squares_vae(), squares() / 4
    drawn = tiles(plots.traversal(vae, x, start=5, columns=4), 3, 4)
    z = vae.embed(x)
    for row, j in enumerate([2, 0, 1]):
        for column, t in enumerate(np.linspace(0, 1, 4)):
            moved = z[5].clone()
            low, high = np.quantile(z[:, j].numpy(), [0.02, 0.98])
            moved[j] = low + t * (high - low)
            expected = vae.decode(moved[None])[0, 0].numpy().clip(0, 1)
            np.testing.assert_allclose(drawn[row, column], expected, atol=1e-6)


def test_traversal_is_labelled_with_dimensions_and_their_variance_as_active_units_has_it():
    vae, x = squares_vae(), squares()
    ax = plots.traversal(vae, x, rows=2)
    variance = pv.active_units(vae, x).variance["z"]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"$z_{{2}}$   {variance[2]:.2f}", f"$z_{{0}}$   {variance[0]:.2f}"]
    ax.figure.canvas.draw()
    assert all(label.get_window_extent().x0 >= 0 for label in ax.get_yticklabels())


def test_traversal_from_the_mean_of_all_data():
    vae, x = squares_vae(), squares() / 4
    drawn = tiles(plots.traversal(vae, x, start=None, columns=1), 3, 1)
    assert drawn[0, 0].flatten()[0] == pytest.approx(vae.embed(x).mean(0)[0].item(), abs=1e-6)


def test_interpolation_is_straight_between_the_posterior_means():
    vae, x = squares_vae(), squares() / 4
    a, b = x[:2], x[2:4]
    ax = plots.interpolation(vae, a, b, columns=5)
    drawn = np.asarray(ax.images[0].get_array())
    for row in range(2):
        line = drawn[3 * row : 3 * row + 2]
        np.testing.assert_allclose(line[:, :2], a[row, 0], atol=1e-6)
        np.testing.assert_allclose(line[:, -2:], b[row, 0], atol=1e-6)
        for column, t in enumerate(np.linspace(0, 1, 5)):
            z = (1 - t) * vae.embed(a)[row] + t * vae.embed(b)[row]
            left = 6 + 3 * column
            expected = vae.decode(z[None].float())[0, 0].numpy()
            np.testing.assert_allclose(line[:, left : left + 2], expected, atol=1e-6)
    assert ax.get_xticks().tolist() == [0.5, 6.5, 18.5, 24.5]  # the middles of a, of the first and last decoded, of b


@pytest.mark.parametrize(
    "program",
    [
        pv.mlp_hierarchical_vae((1, 2, 2), latent_dims=(3, 2)),
        pv.mlp_conditional_vae((1, 2, 2), latent_dim=2, label_dim=3),
        (lambda x: None, lambda x: None),
        None,
    ],
)
def test_pictures_of_latents_refuse_other_programs(program):
    for draw in (lambda x: plots.traversal(program, x), lambda x: plots.interpolation(program, x, x)):
        with pytest.raises(pv.PyroVAEError, match=r"^expected a pv\.VAE or a pv\.Autoencoder.*one latent z.*got "):
            draw(squares())
    assert plt.get_fignums() == []


def test_pictures_of_latents_refuse_bad_data():
    vae, x = squares_vae(), squares()
    with pytest.raises(pv.PyroVAEError, match=r"expected x of two data or more.*got 1\."):
        plots.traversal(vae, x[:1])
    with pytest.raises(pv.PyroVAEError, match=r"start below their number, got 101 and start=101"):
        plots.traversal(vae, x, start=101)
    with pytest.raises(pv.PyroVAEError, match=r"as many images in a as in b.*got 3, 4 and columns=8"):
        plots.interpolation(vae, x[:3], x[:4])
    with pytest.raises(pv.PyroVAEError, match="columns=1"):
        plots.interpolation(vae, x[:3], x[:3], columns=1)
    with pytest.raises(pv.PyroVAEError, match=r"expected x of shape \(N, 1, 2, 2\)"):
        plots.traversal(vae, torch.rand(4, 1, 3, 3))
    vectors = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    with pytest.raises(pv.PyroVAEError, match="expected x to hold one image or more"):
        plots.traversal(vectors, torch.rand(5, 4))
    assert plt.get_fignums() == []
