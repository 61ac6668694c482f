"""How the documentation is built: ``make docs``."""

import logging
import sys
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed

import mamlpp_ext.task_batch.loss

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "gallery")]

project = "mamlpp_ext"
author = "The mamlpp_ext maintainers"
release = metadata.version("mamlpp_ext")

extensions = [
    "error_messages",
    "guide_diff",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery", "inventories"]
html_theme = "furo"
html_title = f"mamlpp_ext {release}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_show_copyright = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # else an attribute that is a property is described twice
napoleon_custom_sections = ["Source"]
myst_heading_anchors = 3

# Every reference has to lead somewhere; inventories/README.md says why these are files.
nitpicky = True
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "Adapt",  # these four are explained where they stand
        "Aggregate",
        "ExtraSteps",
        "Loss",
        "ProcessGroup",  # the others are not documented where they come from
        "torch.distributed.distributed_c10d.ProcessGroup",
        "torchopt.base.GradientTransformation",
    )
]
intersphinx_mapping = {
    name: (url, str(HERE / "inventories" / f"{name}.inv"))
    for name, url in {
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
        "higher": "https://higher.readthedocs.io/en/latest",
        "torchopt": "https://torchopt.readthedocs.io/en/latest",
    }.items()
}
# Where torch's own documentation has them, instead of where they are defined.
torch.nn.Module.__module__ = "torch.nn"
torch.optim.Optimizer.__module__ = "torch.optim"
# Imported for type checkers alone, because a torch may be built without it.
mamlpp_ext.task_batch.loss.ProcessGroup = torch.distributed.ProcessGroup
# A profiler inside torch, imported along the way, makes every logger print what it logs.
logging.getLogger("mamlpp_ext").setLevel(logging.WARNING)

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": "plot_",
    "ignore_pattern": "small_learner",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 3600,
    "show_signature": False,
    "image_srcset": ["2x"],
}
