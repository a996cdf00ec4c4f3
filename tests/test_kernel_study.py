"""The claims and tables of `experiments/kernel_pooling.py`, from rows made up; its parts."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from nn_backprop.data import ImageData

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import kernel_pooling as study

N, SEEDS = 55_000, 3
OPTIONS = study.Options(seeds=SEEDS)
POOLED, UNPOOLED, SAME_LIFT = study.POOLED, study.UNPOOLED, study.SAME_LIFT

# Errors in % that no two contestants share, by (digits, variant), and what a pixel of shift adds.
VECTORS = {256: (11, 17), 1024: (7, 14), 4096: (3, 8), 8192: (2, 5.3)}  # n = 55,000, n = 5,000
RIVALS = {
    "vectors": {(100, "plain"): 41, (1_000, "plain"): 13, (10_000, "plain"): 6.1,
                (10_000, "rotated"): 37, (10_000, "on noise"): 29, (10_000, "on clutter"): 61},
    POOLED: {(100, "plain"): 31, (1_000, "plain"): 9, (10_000, "plain"): 3.3, (N, "plain"): 1.9,
             (10_000, "rotated"): 19, (10_000, "on noise"): 17, (10_000, "on clutter"): 43},
    "CNN": {(100, "plain"): 23, (1_000, "plain"): 4, (10_000, "plain"): 2.2, (N, "plain"): 1.2,
            (10_000, "rotated"): 5, (10_000, "on noise"): 7, (10_000, "on clutter"): 11},
}  # fmt: skip
A_PIXEL = {"vectors": 13, UNPOOLED: 7, SAME_LIFT: 2, POOLED: 3}
# Of the quarter of the digits that is shifted, in its place: the one who loses least errs most.
IN_PLACE = {"vectors": 4.7, UNPOOLED: 1.4, SAME_LIFT: 33, POOLED: 27}
WORLD = (VECTORS, RIVALS, A_PIXEL, -0.5, 1.02)


def made_up(vectors, rivals, a_pixel, power, ratio):
    """Rows for every job of the study. The seeds differ, but all contestants of a seed alike."""
    names = {tuple(way.items()): name for name, way in study._ways(4096).items()}
    rows = []
    for job in study._contests(study.FULL, N, OPTIONS):
        setting = {key: getattr(job, key) for key in ("contestant", "features", "grid", "pooling")}
        name = names.get(tuple((key, value) for key, value in setting.items() if value))
        luck = 0.04 * (job.seed - 1)
        error = {"kernel ridge": 5.0}.get(job.contestant, 14.0)
        if job.contestant == "vectors" and job.n in (N, 5_000) and job.variant == "plain":
            error = vectors[job.features][job.n == 5_000]
        elif name in rivals:
            error = rivals[name][job.n, job.variant]
        row = {**setting, "seed": job.seed, "n": job.n, "variant": job.variant}
        row["accuracy"] = 1 - (error + luck) / 100
        for d in (0, *study.SHIFTS):
            shifted = IN_PLACE.get(name, 8) + d * a_pixel.get(name, 1)
            row[f"accuracy_shift_{d}"] = 1 - (shifted + 10 * luck) / 100
        if job.contestant == "patches":
            row |= {"lifted": 144 * job.features, "pooled": job.grid**2 * job.features}
        rows.append(row)
    kernel = [
        {"seed": seed, "features": D, "mean_error": (1 + seed) * D**power, "largest_error": 0.5,
         "root_mean_square": ratio / D, "derived": 1 / D}
        for seed in range(SEEDS) for D in study.FULL.pairs_of
    ]  # fmt: skip
    return study.Found(rows[::-1], kernel, study.FULL, N, SEEDS)


def swapped(table, a, b):
    return {**table, a: table[b], b: table[a]}


# A start of every claim, in order, and what it measures in the world above and in one in which the
# smallest and largest D, pooled patches and the CNN, and no pooling and its control change places.
EXPECTED = [
    ("error falls with D", 11 - 2, 2 - 11),
    ("error % at D = 8,192, n = 55,000, is 1.7 to 2.5 (our expectation", 2, 11),
    ("of the distance to exact kernel ridge", 0.3 / 12, 12 / 0.3),
    ("error at D = 8,192, n = 5,000, is at most ½ point above", 0.3, 12),
    ("mean error of the kernel falls as D to the power", -0.5, -0.3),
    ("root mean square error of the kernel", 1.02, 0.8),
    (f"equal lift, the same filters (28): shifted by 2 px, points that {SAME_LIFT}", 10, -10),
    (f"equal lift, the same filters (28): shifted by 4 px, points that {SAME_LIFT}", 20, -20),
    (f"equal pooled dimension (about 4,096), unequal lift: shifted by 2 px, points that {POOLED} "
     "loses less than vectors", 2 * (13 - 3), 2 * (3 - 13)),
    (f"equal pooled dimension (about 4,096), unequal lift: shifted by 4 px, points that {POOLED} "
     "loses less than vectors", 4 * (13 - 3), 4 * (3 - 13)),
    (f"equal pooled dimension (about 4,096), unequal lift: shifted by 2 px, points that {POOLED} "
     f"loses less than {UNPOOLED}", 2 * (7 - 3), 2 * (2 - 13)),
    (f"equal pooled dimension (about 4,096), unequal lift: shifted by 4 px, points that {POOLED} "
     f"loses less than {UNPOOLED}", 4 * (7 - 3), 4 * (2 - 13)),
    ("needs much data", (31 - 23) - (1.9 - 1.2), (1.9 - 1.2) - (31 - 23)),
    ("struggles: ", (19 - 5) - (3.3 - 2.2), (3.3 - 2.2) - (19 - 5)),
    ("struggles: ", (17 - 7) - (3.3 - 2.2), (3.3 - 2.2) - (17 - 7)),
    ("struggles: ", (43 - 11) - (3.3 - 2.2), (3.3 - 2.2) - (43 - 11)),
    ("on clutter, points", 61 - 43, 5 - 11),
]  # fmt: skip


def test_every_claim_comes_out_as_by_hand():
    claims = study._claims(made_up(*WORLD))
    assert len(claims) == len(EXPECTED)
    for claim, (start, measured, _) in zip(claims, EXPECTED, strict=True):
        assert claim.claim.startswith(start)
        assert claim.measured == pytest.approx(measured, abs=1e-9)
        assert claim.verdict == "reproduced"
    assert [c.claim.split(", ")[-1] for c in claims[13:16]] == list(study.VARIANTS)[1:]
    # Bars of our own are not passed off as published.
    assert [claim.published for claim in claims] == [None] * 4 + [-0.5, 1.0] + [None] * 11


def test_every_claim_fails_where_it_is_false():
    rivals = swapped(RIVALS, POOLED, "CNN")
    rivals["vectors"] = {**rivals["vectors"], (10_000, "on clutter"): 5}
    pixel = swapped(swapped(A_PIXEL, UNPOOLED, SAME_LIFT), "vectors", POOLED)
    claims = study._claims(made_up(swapped(VECTORS, 256, 8192), rivals, pixel, -0.3, 0.8))
    for claim, (_, _, measured) in zip(claims, EXPECTED, strict=True):
        assert claim.measured == pytest.approx(measured, abs=1e-9)
        assert claim.verdict == "not reproduced"


def test_the_tables_show_every_error_in_its_place():
    found = made_up(*WORLD)
    dimension, kernel, shifts, data, harder = study._tables(found).values()
    by_name = {row["contestant"]: row for row in shifts}
    assert list(by_name) == list(found.ways)
    # A quarter in its place, not all test digits (6.10); 13 points more for a pixel.
    assert by_name["vectors"]["error %, 0 px"] == "4.70 ± 0.40"
    assert by_name["vectors"]["error %, 6 px"] == f"{4.7 + 6 * 13:.2f} ± 0.40"
    assert [(by_name[name]["lifted"], by_name[name]["pooled"])
            for name in (UNPOOLED, SAME_LIFT, POOLED, "CNN")] == [
        (4032, 4032), (4032, 448), (36_864, 4096), ("–", "–")
    ]  # fmt: skip
    assert [row["error %, n = 100"] for row in data] == [
        "41.00 ± 0.04", "31.00 ± 0.04", "23.00 ± 0.04",  # then what the first two are behind
        "18.00 ± 0.00", "8.00 ± 0.00",
    ]  # fmt: skip
    assert data[-1]["contestant"] == f"{POOLED}: points more than the CNN"
    assert data[-1]["error %, n = 55,000"] == "0.70 ± 0.00"
    assert [row["error %, on clutter"] for row in harder] == [
        "61.00 ± 0.04", "43.00 ± 0.04", "11.00 ± 0.04"
    ]  # fmt: skip
    assert dimension[4] == {
        "features": "vectors, D = 8,192",
        "error %, n = 55,000": "2.00 ± 0.04", "error %, n = 5,000": "5.30 ± 0.04",
    }  # fmt: skip
    assert [row["D"] for row in kernel] == list(study.FULL.pairs_of)
    assert kernel[0]["mean error"] == f"{2 / 8:.4f}"  # 1 + seed: 2 in the mean; D = 64


def test_no_two_settings_share_a_tag():
    rows = made_up(*WORLD).rows
    tags = {tag for row in rows for tag in study._tagged(row)}
    assert len(tags) * SEEDS == len(rows)
    assert "accuracy of vectors 4096/n 10000 rotated" in tags
    row = {"contestant": "kernel", "features": 64, "mean_error": 0.1}
    assert study._tagged(row) == {"kernel error/D 64": 0.1}


# --- what the rows are made of ---


def grouped(n=32):
    """Random images of 5 × 7 pixels, brighter by class, with the splits in the order of classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 100, (3 * n, 1, 5, 7), generator=generator)
    labels = torch.arange(n).mul(10).div(n, rounding_mode="floor").repeat(3)
    images += 15 * labels[:, None, None, None]
    splits = torch.arange(3 * n).split(n)
    return ImageData("made up", "", images.to(torch.uint8), labels, *splits, 0.4, 0.3)


def test_a_quarter_of_the_test_digits_moves_in_all_directions():
    data = grouped()
    assert torch.equal(study._shifted(data, 0).images, data.images)
    moved = study._shifted(data, 2).images
    before, after = data.images[data.test], moved[data.test]
    assert torch.equal(after[0, 0, :3], before[0, 0, 2:])
    assert torch.equal(after[4, 0, 2:], before[4, 0, :3])
    assert torch.equal(after[8, 0, :, :5], before[8, 0, :, 2:])
    assert torch.equal(after[12, 0, :, 2:], before[12, 0, :, :5])
    changed = (moved != data.images).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, data.test[::4])


def test_sigma_is_that_of_digits_of_all_classes():
    data = grouped(20_000)
    images, _ = data.batch(data.train)
    of_all = study.median_distance(images) / 2
    assert study._sigma_of_vectors(data, 0) == pytest.approx(of_all, rel=0.03)
    assert study.median_distance(images[:5000]) / 2 < 0.9 * of_all  # three classes
    patches = study.random_patches(images, study.PATCH, 20_000)
    of_all = study.median_distance(patches) / 2
    assert study._sigma_of_patches(data, 0) == pytest.approx(of_all, rel=0.03)


@pytest.mark.parametrize("strength", [1e-3, 10.0])
def test_the_ridge_solves_its_equations(strength):
    data = grouped(50)
    images, labels = data.batch(data.train, torch.float64)
    z = torch.cat([images.flatten(1), torch.ones(50, 1, dtype=torch.float64)], 1)
    y = torch.eye(10, dtype=torch.float64)[labels] - 0.1
    # |z w − y|² + s |w|², where s is `strength` times the mean of |z|²: s as rows of their own.
    root = (strength * z.square().sum(1).mean()).sqrt() * torch.eye(36).double()
    weight = torch.linalg.lstsq(torch.cat([z, root]), torch.cat([y, y.new_zeros(36, 10)])).solution
    predict = study._ridge(lambda x: x.flatten(1), data, strength)
    assert_close(predict(images.float()).double(), z @ weight, rtol=1e-3, atol=1e-4)
