"""Learned inner rates: which parameters they adapt, and the update that uses them."""

from mamlpp_ext.lslr.rates import LSLR, checked_lslr

__all__ = ["LSLR", "checked_lslr"]
