"""Measures of a test set: the table of their names and titles, which settings and commands read without numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    title: str
    higher: bool = True


METRICS: dict[str, Metric] = {
    "auroc": Metric("AUROC"),
    "ap": Metric("AP"),
    "accuracy": Metric("accuracy"),
    "top5": Metric("top-5 accuracy"),
    "balanced_accuracy": Metric("balanced acc."),
    "macro_f1": Metric("macro F1"),
    "quadratic_kappa": Metric("quadratic kappa"),
    "mae": Metric("MAE (classes)", higher=False),
    "sensitivity": Metric("sensitivity"),
    "specificity": Metric("specificity"),
    "ppv": Metric("PPV"),
    "npv": Metric("NPV"),
    "f1": Metric("F1"),
    "nll": Metric("NLL", higher=False),
    "brier": Metric("Brier", higher=False),
    "ece": Metric("ECE", higher=False),
}
