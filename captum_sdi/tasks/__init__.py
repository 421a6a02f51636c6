"""Seeded generators of algorithmic tasks; nothing is downloaded.

A task is a function `task(size, ..., seed=0) -> TaskDataset` in a file of its own. All examples of
a dataset differ, the same seed gives the same dataset everywhere, and no global random state is
touched. The datasets serve as `train_dataset` of a Hugging Face `Trainer` and of `SDIInfluence`.

To add a task, write its examples as text, a character per token, in a new file and list the
function here:

* `Example.question(prompt, answer)` predicts the answer; `Example(text, targets)` anything else,
  for instance the solution of a puzzle at its blanks, for a model with `is_causal=False`;
* where examples can be numbered, `draw_examples` draws different ones; `parity.py` is the pattern;
* `TaskDataset(examples, characters, length)` does the encoding, the labels and the padding.
"""

from captum_sdi.tasks.addition import addition
from captum_sdi.tasks.dataset import Example, TaskDataset, draw_examples
from captum_sdi.tasks.parity import parity

__all__ = ["Example", "TaskDataset", "addition", "draw_examples", "parity"]
