"""Multiply-adds as counted by hand."""

import contextlib

import torch
from torch import nn

from nn_backprop import layers, models
from nn_backprop.models import counting


def test_multiply_adds_of_the_networks_by_hand():
    image = torch.randn(1, 1, 28, 28)
    assert counting.multiply_adds(models.happy(), image) == 784 * 16 + 16 * 16 + 16 * 10
    # 5 × 5 kernels: 16 maps of 24 × 24 from 1, 32 maps of 8 × 8 from 16; then 512 numbers to 10
    by_hand = 16 * 24 * 24 * 25 + 32 * 8 * 8 * 16 * 25 + 512 * 10
    assert counting.multiply_adds(models.CNN(), image) == by_hand


def test_a_border_and_groups_are_counted_as_they_are_read():
    conv = nn.Conv2d(2 * 3, 2 * 5, 3, stride=2, padding=1, groups=2)
    # 7 × 11 pixels become 4 × 6 places; at each, 10 maps read 3 channels of their group
    assert counting.multiply_adds(conv, torch.randn(1, 6, 7, 11)) == 4 * 6 * 10 * 3 * 9


def test_a_batch_costs_its_size_and_the_mode_stays():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[2].eval()
    for inputs in (torch.randn(7, 5), torch.randn(7, 4)):
        with contextlib.suppress(RuntimeError):  # of the second, which does not fit
            assert counting.multiply_adds(model, inputs) == 7 * 15
        assert [module.training for module in model.modules()] == [True, True, True, False]


def test_parameters_are_those_that_are_trained():
    layer = nn.Linear(5, 3)
    twice = nn.Sequential(layer, nn.Linear(3, 5), layer)
    assert counting.parameters(twice) == 18 + 20
    layer.bias.requires_grad_(False)
    assert counting.parameters(twice) == 15 + 20


def test_links_are_the_multiply_adds_of_an_image_and_one_for_each_biased_unit():
    image, units = torch.randn(1, 3, 7, 11), 5 * 6 * 9
    assert counting.links(nn.Conv2d(3, 5, (2, 3)), image) == units * (3 * 6 + 1)
    assert counting.links(nn.Conv2d(3, 5, (2, 3), bias=False), image) == units * 3 * 6
    assert counting.links(models.happy(), torch.randn(1, 784)) == 13_002  # none is shared
    # Maps of two sizes: four products, three of them on a quarter of the pixels; a bias a unit.
    layer = layers.OctaveConv2d(4, 8, 3, alpha_in=0.25, alpha_out=0.5)
    maps = torch.randn(1, 3, 6, 10), torch.randn(1, 1, 3, 5)
    pixels, quarter = 6 * 10, 3 * 5
    multiply_adds = 9 * (3 * 4 * pixels + (1 * 4 + 3 * 4 + 1 * 4) * quarter)
    assert counting.multiply_adds(layer, maps) == multiply_adds
    assert counting.links(layer, maps) == multiply_adds + 4 * pixels + 4 * quarter
