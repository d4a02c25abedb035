"""Adversarial Flow Distillation: a causal video student learns on-policy from a black-box teacher's finished videos."""

__version__ = "0.1.0"
