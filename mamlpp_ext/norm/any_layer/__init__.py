"""Parameters of any layer with a row for every inner step, in a subclass of the layer's own class.

Not by torch's parametrizations, which also let a layer read something else than it holds: a
parametrized module cannot be pickled (2.13: "only supported through state_dict()"), its parameters
change their names to ``parametrizations.weight.original``, so that plain checkpoints, patterns and
rates no longer find them, ``higher`` takes their place for properties of its own, and what reads
``layer.weight`` from outside gets a row, where a layer of ours shows the table.
"""

from mamlpp_ext.norm.any_layer.by_name import per_step_parameters
from mamlpp_ext.norm.any_layer.give_rows import check_owners, give_rows

__all__ = ["check_owners", "give_rows", "per_step_parameters"]
