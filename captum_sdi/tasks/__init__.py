"""Seeded generators of algorithmic tasks; nothing is downloaded.

A task is a function `task(size, ..., seed=0) -> TaskDataset` in a file of its own. All examples of
a dataset differ, the same seed gives the same dataset everywhere, and no global random state is
touched. The datasets serve as `train_dataset` of a Hugging Face `Trainer` and of `SDIInfluence`.

`Facts` is another kind: documents and questions whose answers rest on several of them, a word per token.

To add a task, write its examples as text, a character per token, in a new file and list the
function here:

* `Example.question(prompt, answer)` predicts the answer; `Example(text, targets)` anything else,
  for instance the solution of a puzzle at its blanks, for a model with `is_causal=False`;
* `difficulty` says how hard an example is, to group results by;
* where examples can be numbered, `draw_examples` draws different ones; `parity.py` is the pattern,
  `sudoku.py` where a number is the seed of an example;
* `TaskDataset(examples, characters, length)` does the encoding, the labels and the padding.
"""

from captum_sdi.tasks.addition import addition
from captum_sdi.tasks.dataset import Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples
from captum_sdi.tasks.facts import Facts
from captum_sdi.tasks.p_hop import p_hop
from captum_sdi.tasks.parity import parity
from captum_sdi.tasks.sorting import sorting
from captum_sdi.tasks.sudoku import permute_digits, sudoku

__all__ = [
    "Example",
    "Facts",
    "TaskDataset",
    "addition",
    "draw_examples",
    "p_hop",
    "parity",
    "permute_digits",
    "sorting",
    "sudoku",
]
