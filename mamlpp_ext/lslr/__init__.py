"""Learned inner rates: what they adapt, gradients, the update, calls with adapted weights."""

from mamlpp_ext.lslr.call import called, functional_call
from mamlpp_ext.lslr.gradients import support_gradients, without_hooks
from mamlpp_ext.lslr.places import places_of
from mamlpp_ext.lslr.rates import LSLR, checked_lslr
from mamlpp_ext.lslr.update import check_reached

__all__ = [
    "LSLR",
    "called",
    "check_reached",
    "checked_lslr",
    "functional_call",
    "places_of",
    "support_gradients",
    "without_hooks",
]
