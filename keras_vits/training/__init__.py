"""Training: data sets, parameter groups and the fit loop of the command line."""

from keras_vits.training.groups import ParameterGroup, adamw, parameter_groups

__all__ = ["ParameterGroup", "adamw", "parameter_groups"]
