"""Adapted layers, one file per kind."""

from floral_peft.tuner.layers.base import FloralLayer
from floral_peft.tuner.layers.batch_norm import BatchNorm, ReparametrizedBatchNorm
from floral_peft.tuner.layers.conv import Conv, ConvTranspose
from floral_peft.tuner.layers.dispatch import layer_class
from floral_peft.tuner.layers.embedding import Embedding
from floral_peft.tuner.layers.linear import Linear
from floral_peft.tuner.layers.norm import Norm, is_norm


__all__ = [
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Embedding",
    "FloralLayer",
    "Linear",
    "Norm",
    "ReparametrizedBatchNorm",
    "is_norm",
    "layer_class",
]
