"""The documentation builds without a warning and has every public name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mamlpp_ext as mpp
from mamlpp_ext.integrations import higher, torchopt

ROOT = Path(__file__).parents[1]


def test_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, ROOT / "docs", tmp_path], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference.html").read_text()
    for module in (mpp, higher, torchopt):
        for name in module.__all__:
            if not name.startswith("__"):
                assert f'id="{module.__name__}.{name}"' in page
    for guide in ("higher", "torchopt"):
        page = (tmp_path / "guides" / f"{guide}.html").read_text()
        assert "mpp.inner_steps" in page  # the diff is there
        assert "--- " in page
