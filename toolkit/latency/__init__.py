"""Latency tables: width variants of a program, measured inside whole networks, and the model fitted to them."""

from toolkit.latency.measure import ModelTable
from toolkit.latency.predict import LatencyModel, PlaceCost
from toolkit.latency.sites import Site
from toolkit.latency.table import adopt_table, load_table, share_table
from toolkit.latency.variants import VariantMaker, ambiguous_forms, choose_probe_widths, solve

__all__ = [
    "LatencyModel",
    "ModelTable",
    "PlaceCost",
    "Site",
    "VariantMaker",
    "adopt_table",
    "ambiguous_forms",
    "choose_probe_widths",
    "load_table",
    "share_table",
    "solve",
]
