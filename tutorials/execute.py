"""Execute a notebook in full, write the outputs into it, and say what that took: `make tutorials-full`."""

import base64
import os
import resource
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# Which of a notebook's pictures, counted from 0, the gallery of the README shows.
GALLERY = {
    "01_which_document_which_hop": 0,
    "02_your_own_model": 0,
    "03_can_i_believe_it": 0,
    "04_label_errors_and_a_shortcut": 0,
    "05_six_ways_to_be_fooled": 1,
    "06_language_model_on_real_text": 0,
    "07_how_big_a_sketch": 0,
    "08_a_known_answer": 0,
    "09_length_generalisation": 1,
}

path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, with its own path, where ipywidgets is missing
start = time.perf_counter()
# Without times in its metadata, a notebook that still says the same is still the same file. When a cell fails,
# execute() raises and the file stays as it was.
NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
nbformat.write(notebook, path)
minutes = (time.perf_counter() - start) / 60
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
print(f"{path.name}: {minutes:.1f} minutes, {peak:.1f} GB at the most")

outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
if path.stem in GALLERY:
    image = path.parent / "images" / f"{path.stem}.png"
    image.write_bytes(base64.b64decode(pictures[GALLERY[path.stem]]))
