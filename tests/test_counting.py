"""Multiply-adds as counted by hand."""

import torch
from torch import nn

from nn_backprop import counting, models


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
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train()
    assert counting.multiply_adds(model, torch.randn(7, 5)) == 7 * 15
    assert model.training and model[1].training


def test_parameters_are_those_that_are_trained():
    layer = nn.Linear(5, 3)
    twice = nn.Sequential(layer, nn.Linear(3, 5), layer)
    assert counting.parameters(twice) == 18 + 20
    layer.bias.requires_grad_(False)
    assert counting.parameters(twice) == 15 + 20
