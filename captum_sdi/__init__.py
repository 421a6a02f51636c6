"""captum_sdi: which training examples shaped this answer, and at which step of the model's thinking.

A looped transformer applies one shared block τ times. Let φ_t(w; z) be the part of the gradient ∇_w ℓ(w; z) that flows
through the t-th use of the block, so that ∇_w ℓ = Σ_t φ_t. For checkpoints w_c with learning rates η_c:

    TracIn(z, z')     = Σ_c η_c ⟨ Σ_s φ_s(w_c; z), Σ_t φ_t(w_c; z') ⟩      one number per (test, train) pair
    SDI_t(z, z')      = Σ_c η_c ⟨ Σ_s φ_s(w_c; z), φ_t(w_c; z') ⟩          a trajectory over loop steps
    SDI_{s,t}(z, z')  = Σ_c η_c ⟨ φ_s(w_c; z), φ_t(w_c; z') ⟩              the step-by-step matrix

z is a training example, z' a test example; positive influence means that training on z lowers the loss of z'.

Axis letters, in every docstring and einsum: ``n`` train examples, ``q`` test examples, ``p`` token positions, ``t``
loop step of the test side (0-based), ``s`` loop step of the train side, ``i``/``o`` in/out features of a layer, ``d``
sketch dimension, ``c`` checkpoint, ``k`` Captum's top-k. Score matrices are (test, train), as in Captum.

Source: Kaissis et al., "Step-resolved data attribution for looped transformers", arXiv 2602.10097; TracIn: Pruthi et
al., arXiv 2002.08484.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_sdi import evaluate, models, plotting, report, tasks
    from captum_sdi.capture.coverage import coverage_check
    from captum_sdi.checkpoints import load_checkpoint
    from captum_sdi.cost import estimate
    from captum_sdi.data.texts import texts
    from captum_sdi.features import LoopSpec
    from captum_sdi.index import Faiss, SketchIndex
    from captum_sdi.influence import SDIInfluence
    from captum_sdi.loop.finding import find_loop
    from captum_sdi.scores import InfluenceMap, StepInfluence
    from captum_sdi.sketch import Exact, TensorSketch

__all__ = [
    "Exact",
    "Faiss",
    "InfluenceMap",
    "LoopSpec",
    "SDIInfluence",
    "SketchIndex",
    "StepInfluence",
    "TensorSketch",
    "coverage_check",
    "estimate",
    "evaluate",
    "find_loop",
    "load_checkpoint",
    "models",
    "plotting",
    "report",
    "tasks",
    "texts",
]

__version__: str

# Importing torch takes seconds, which `captum-sdi --help` need not wait for: a public name is imported when it is first
# looked up (PEP 562). This table serves the interpreter; the imports above, type checkers and editors.
_SUBPACKAGES = ("evaluate", "models", "plotting", "report", "tasks")
_MODULE_OF = {
    "Exact": "captum_sdi.sketch",
    "Faiss": "captum_sdi.index",
    "InfluenceMap": "captum_sdi.scores",
    "LoopSpec": "captum_sdi.features",
    "SDIInfluence": "captum_sdi.influence",
    "SketchIndex": "captum_sdi.index",
    "StepInfluence": "captum_sdi.scores",
    "TensorSketch": "captum_sdi.sketch",
    "coverage_check": "captum_sdi.capture.coverage",
    "estimate": "captum_sdi.cost",
    "find_loop": "captum_sdi.loop.finding",
    "load_checkpoint": "captum_sdi.checkpoints",
    "texts": "captum_sdi.data.texts",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name in _SUBPACKAGES:
        value = import_module(f"captum_sdi.{name}")
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name == "__version__":
        value = version("captum-sdi")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
