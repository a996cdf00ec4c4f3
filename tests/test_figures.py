"""The figures: what they say, and that they are small files which need no global state."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nn_backprop import figures


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def rendered(figure: Figure) -> Figure:
    figure.canvas.draw()
    return figure


def test_weights_share_one_scale_that_is_symmetric_about_white():
    weight = torch.linspace(-0.5, 2.0, 3 * 5 * 7).reshape(3, 5, 7)
    axes, bar = rendered(figures.weight_images(weight, "Weights")).axes
    (drawn,) = axes.images
    assert drawn.get_clim() == (-2.0, 2.0) and bar.get_ylabel() == "weight"
    assert min(drawn.cmap(drawn.norm(0.0))[:3]) > 0.95
    grid = np.ma.filled(drawn.get_array(), np.nan)
    assert grid.shape == (2 * 5 + 1, 2 * 7 + 1)  # two by two, a gap between
    np.testing.assert_array_equal(grid[:5, 8:], weight[1].numpy())
    np.testing.assert_array_equal(grid[6:, :7], weight[2].numpy())
    assert np.isnan(grid[5]).all() and np.isnan(grid[6:, 7:]).all()
    for units, title in ((64, "W"), (128, "W · first 64 of 128")):
        axes, _ = figures.weight_images(torch.randn(units, 2, 3), "W").axes
        assert axes.get_title() == title
        assert axes.images[0].get_array().shape == (8 * 3 - 1, 8 * 4 - 1)
    for value in (0.0, float("nan")):
        rendered(figures.weight_images(torch.full((2, 3, 5), value), "W"))


def test_the_confusion_matrix_says_counts_and_shares():
    counts = torch.tensor([[998, 2, 0], [0, 0, 0], [1, 3, 4]])
    figure = rendered(figures.confusion_matrix(counts, ["a", "b", "c"]))
    axes = figure.axes[0]
    shown = [text for each in figure.axes for text in texts(each.texts)]
    assert shown == [str(count) for count in counts.flatten().tolist()]
    assert axes.get_title() == "Confusion matrix: 1002 of 1008 right, 99.40 %"
    assert texts(axes.get_yticklabels()) == ["a", "b", "c"]
    (margin,), (drawn,) = axes.child_axes, axes.images
    assert texts(margin.get_yticklabels()) == ["99.8 %", "–", "50.0 %"]
    colours = drawn.cmap(drawn.norm(drawn.get_array()))[..., :3]
    assert colours[0, 1].min() < 0.9  # 2 in 1000 stand out from none
    np.testing.assert_array_equal(colours[0, 2], to_rgb("white"))


def test_mistakes_are_captioned_in_order_and_cut_at_25():
    n = 27
    images = torch.randint(256, (n, 8, 8), dtype=torch.uint8)
    true, taken_for = torch.arange(n) % 10, torch.arange(1, n + 1) % 10
    figure = figures.mistakes(images, true, taken_for, torch.linspace(0.998, 0.5, n), "Mistakes")
    assert figure.get_suptitle() == "Mistakes · first 25 of 27" and len(figure.axes) == 25
    assert figure.axes[0].get_title() == "0 taken for 1 · 99.8 %"
    assert figure.axes[9].get_title().startswith("9 taken for 0")
    none = torch.zeros(0)
    figure = rendered(figures.mistakes(torch.zeros(0, 8, 8), none, none, none, "Mistakes"))
    assert figure.get_suptitle() == "Mistakes: none"


def test_learning_curves_put_each_tag_where_it_belongs():
    records = [{"step": s, "epoch": 1, "loss/train": 0.9**s} for s in range(1, 50)]
    records += [{"step": 0, "epoch": 0, "loss/validation": 2.3, "accuracy/validation": 0.1}]
    records += [{"step": 49, "epoch": 1, "loss/validation": 0.2, "accuracy/validation": 0.9}]
    records[0] |= {f"gradient_norm/{k}.weight": 3.0 for k in range(3)}
    loss, accuracy, gradient = rendered(figures.learning_curves(records)).axes
    curves = {line.get_label(): line.get_xydata() for line in loss.lines}
    np.testing.assert_array_equal(curves["validation"], [[0, 2.3], [49, 0.2]])
    np.testing.assert_array_equal(curves["train"][:, 0], range(1, 50))
    assert loss.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    assert 0.8 < accuracy.get_ylim()[0] < 0.9  # the guesses of step 0 do not flatten the rest
    assert [line.get_label() for line in gradient.lines] == ["0.weight", "1.weight", "2.weight"]

    long = [{"step": step, "loss/train": step % 2} for step in range(1000)]
    mean, points = figures.learning_curves(long).axes[0].lines  # means over the points
    np.testing.assert_array_equal(mean.get_ydata(), np.full(100, 0.5))
    assert len(points.get_ydata()) == 1000 and points.get_alpha() < 0.5
    diverged = {"step": 0, "loss/train": float("nan"), "gradient_norm/x": float("inf")}
    for records in ([], [diverged]):
        rendered(figures.learning_curves(records))


def test_precision_recall_gives_the_average_precision_of_each_class():
    truth = torch.tensor([0, 0, 1, 1, 3])  # nothing is of class 2
    scores = torch.tensor([[9, 1, 1, 1], [3, 5, 1, 1], [2, 8, 1, 1], [4, 4, 1, 1], [1, 1, 1, 9]])
    is_class = torch.nn.functional.one_hot(truth).bool()
    (axes,) = rendered(figures.precision_recall(is_class, scores / 12)).axes
    # By hand: class 0 is found at ranks 1 and 3, class 1 at 1 and 3.
    labels = ["0 · AP 0.8333", "1 · AP 0.8333", "3 · AP 1.0000"]
    assert texts(axes.get_legend().get_texts()) == labels
    low, high = axes.get_xlim()
    assert low < 2 / 3 and high > 1


def test_a_saved_figure_is_a_small_png_and_leaves_nothing_else(tmp_path):
    figures.save(figures.weight_images(torch.randn(64, 28, 28), "W"), tmp_path / "weights.png")
    (file,) = tmp_path.iterdir()
    assert file.name == "weights.png" and file.stat().st_size < 500_000
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def panels(*parts: figures.Panel) -> list:
    return rendered(figures.side_by_side(parts, "all")).axes


def test_panels_draw_lines_levels_words_and_an_image():
    curve = [(10, 0.5, (0.1, 0.1)), (100, 0.05, (0.01, 0.02))]
    words = [("plain", 0.2, 0.0), ("hard", 0.4, 0.1)]
    first, second, third, *_, spare = panels(
        figures.Panel("a", "D", "error", {"one": curve, "two": curve}, "xy", True, {"limit": 0.02}),
        figures.Panel("b", lines={"two": words, "three": words[::-1]}),
        figures.Panel("c", image=torch.zeros(3, 5, dtype=torch.uint8)),
        figures.Panel("d", lines={"one": curve}),
    )
    assert (first.get_xscale(), first.get_yscale(), second.get_yscale()) == ("log", "log", "linear")
    assert texts(first.get_xticklabels()) == ["10", "100"]
    assert {"2 %", "5 %", "10 %", "20 %"} <= set(texts(first.get_yticklabels()))
    assert sorted(texts(first.get_legend().get_texts())) == ["limit", "one", "two"]
    one, two = (container[0] for container in first.containers)
    np.testing.assert_array_equal(one.get_xydata(), [[10, 0.5], [100, 0.05]])
    bars = first.containers[0][2][0].get_segments()
    np.testing.assert_allclose(bars, [[[10, 0.4], [10, 0.6]], [[100, 0.04], [100, 0.07]]])
    of_words, beside = (container[0] for container in second.containers)
    assert of_words.get_color() == two.get_color() != one.get_color()
    assert of_words.get_linestyle() == "None" and one.get_linestyle() == "-"
    assert texts(second.get_xticklabels()) == ["plain", "hard"]
    np.testing.assert_allclose(of_words.get_xdata().astype(float), [-0.1, 0.9])
    np.testing.assert_allclose(beside.get_xdata().astype(float), [1.1, 0.1])
    assert third.images[0].get_array().shape == (3, 5) and not spare.axison


def test_a_point_is_mean_and_deviation_and_crowded_places_share_round_ticks():
    assert figures.point("x", [1.0, 3.0]) == ("x", 2.0, pytest.approx(2**0.5))
    apart, crowded, many = [10, 13, 20], [10, 11, 20], [10, 20, *(30 * 2**k for k in range(9))]
    measured = [8.123456, 20]
    for places, shared in ((apart, False), (crowded, True), (many, True), (measured, True)):
        lines = {f"{x}": [(x, 1.0, 0.1)] for x in places}
        (axes,) = panels(figures.Panel("a", lines=lines, log="x"))
        assert (list(axes.get_xticks()) != places) == shared
        assert set(texts(axes.get_xticklabels())) >= {"10", "20"}


def test_weights_over_time_have_a_picture_for_each_network_and_moment():
    weights = {
        name: {"before": torch.full((4, 3, 5), 0.25), "after": torch.full((4, 3, 5), size)}
        for name, size in (("one", -2.0), ("two", 0.5))
    }
    parts = [figures.Panel("a", lines={"one": [(1, 2.0, 0.5)]}), figures.Panel("b")]
    *pictures, first, second = rendered(figures.weights_over_time(weights, parts, "all")).axes
    shown = [(a.get_ylabel(), a.get_title(), a.get_xlabel()) for a in pictures]
    assert shown[:2] == [("one", "before", "± 0.25"), ("", "after", "± 2")]
    assert shown[2:] == [("two", "", "± 0.25"), ("", "", "± 0.5")]
    for axes, largest in zip(pictures, (0.25, 2, 0.25, 0.5), strict=True):
        assert axes.images[0].get_clim() == (-largest, largest)
        assert axes.images[0].get_array().shape == (2 * 3 + 1, 2 * 5 + 1)
    assert pictures[1].images[0].get_array()[0, 0] == -2
    assert (first.get_title(), second.get_title()) == ("a", "b")
