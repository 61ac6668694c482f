"""One thin adapter for each library; import the one you use.

``mamlpp_ext.integrations.higher`` and ``mamlpp_ext.integrations.torchopt`` need these packages; the
core never imports them.
"""
