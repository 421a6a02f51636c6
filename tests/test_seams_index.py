"""An index is opened and searched without what computes it: no hooks, no models, no Captum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import captum_sdi

PACKAGE = Path(captum_sdi.__file__).parent
MODULES = sorted(f"captum_sdi.index.{file.stem}" for file in (PACKAGE / "index").glob("[!_]*.py"))

PROGRAM = """
import importlib, sys, types
package = types.ModuleType("captum_sdi")  # the package alone, whatever its __init__ imports
package.__path__ = [sys.argv[1]]
sys.modules["captum_sdi"] = package
heavy = ("captum_sdi.capture", "captum_sdi.passes", "captum_sdi.models", "transformers", "captum")
for module in sys.argv[2:]:
    importlib.import_module(module)
    for name in sys.modules:
        if name.startswith(tuple(f"{root}." for root in heavy)) or name in heavy:
            sys.exit(f"{module} imports {name}")
print("imported", len(sys.argv) - 2)
"""


def test_nothing_that_computes_is_imported() -> None:
    program = [sys.executable, "-c", PROGRAM, str(PACKAGE), "captum_sdi.index", *MODULES]
    told = subprocess.run(program, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"imported {1 + len(MODULES)}\n"
