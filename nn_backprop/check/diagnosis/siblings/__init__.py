"""Functions that are easily taken for one another, by the name of the one in the forward."""

from nn_backprop.check.diagnosis.confusions import Families
from nn_backprop.check.diagnosis.siblings import functions, layers

DIMS = (1, 2, 3)

FAMILIES = Families(
    by_name={
        **{name: functions.of_activation(name) for name in functions.ACTIVATIONS},
        "softmax": functions.of_softmax,
        "log_softmax": functions.of_log_softmax,
        "cumsum": functions.of_running_sum,
        **dict.fromkeys(("amax", "amin"), functions.of_extreme),
        **dict.fromkeys(("var", "std"), functions.of_spread),
        **dict.fromkeys(("maximum", "minimum", "hypot", "atan2", "arctan2"), functions.of_pair),
        **{loss.__name__: functions.of_loss for loss in functions.LOSSES},
        "scaled_dot_product_attention": functions.of_attention,
        **dict.fromkeys((f"max_pool{d}d" for d in DIMS), layers.of_max_pooling),
        **dict.fromkeys((f"avg_pool{d}d" for d in DIMS), layers.of_average_pooling),
        **dict.fromkeys((f"adaptive_avg_pool{d}d" for d in DIMS), layers.of_adaptive_pooling),
        "interpolate": layers.of_interpolation,
        "pad": layers.of_padding,
        **dict.fromkeys((f"conv{d}d" for d in DIMS), layers.of_convolution),
        **dict.fromkeys((f"conv_transpose{d}d" for d in DIMS), layers.of_transposed_convolution),
        "group_norm": layers.of_group_norm,
        "layer_norm": layers.of_layer_norm,
        "batch_norm": layers.of_batch_norm,
        "instance_norm": layers.of_instance_norm,
    },
    of_any=functions.without_an_option,
    kinds={
        "the identity": "missing-factor",
        "the sum over each window": "missing-factor",
        "the convolution of all groups' channels": "extra-term",
        "the same with its groups interleaved": "permuted",
        "the same without its weight": "missing-factor",
        "the same without its pos_weight": "missing-factor",
        "the same without its attn_mask": "missing-factor",
        "the same without its is_causal": "missing-factor",
        "the same without its ignore_index": "extra-term",
        "the same without its padding_idx": "extra-term",
        "the same without its label_smoothing": "missing-term",
    },
)
