"""How the documentation is built: ``make docs``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "mamlpp_ext"
author = "The mamlpp_ext maintainers"
release = metadata.version("mamlpp_ext")

extensions = [
    "guide_diff",
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
