"""MAML against MAML++ on a model of your own: ``python -m mamlpp_ext.benchmark --help``."""
