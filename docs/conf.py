"""How the documentation is built: ``make docs``."""

from importlib import metadata

project = "mamlpp_ext"
author = "The mamlpp_ext maintainers"
release = metadata.version("mamlpp_ext")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"mamlpp_ext {release}"

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # else an attribute that is a property is described twice
napoleon_custom_sections = ["Source"]
myst_heading_anchors = 3
