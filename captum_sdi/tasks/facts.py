"""Facts about people, one in a document, and questions whose answers are chains of them.

A document such as "Ana's boss is Bo" is a row of three tokens, `Ana 's boss`, whose labels are `Bo 's boss`: for a
model with `is_causal=False`, which writes the answer in the place of the person. With `feedback="tokens"` its next loop
step then reads `Bo 's boss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_sdi.tasks.arguments import check_integer
from captum_sdi.tasks.dataset import IGNORED

PEOPLE = (
    "Ana", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo", "Kai", "Lou", "Mia", "Ned", "Ola", "Pia", "Quin",
    "Roy", "Sue", "Tom", "Uma", "Val", "Wes", "Xia", "Yan", "Zoe",
)  # fmt: skip
RELATIONS = ("boss", "friend")
WORDS = (*PEOPLE, "'s", *RELATIONS)
"""The vocabulary: a word's token id is its place."""


class Sentences(Dataset[dict[str, Tensor]]):
    """Rows of `input_ids` and `labels`, (p,) each, and what they say.

    Attributes:
        texts: The sentences, in English.
        input_ids: All rows, (n, p); `labels` likewise.
    """

    def __init__(self, texts: Sequence[str], input_ids: Tensor, labels: Tensor) -> None:
        self.texts = list(texts)
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the words of token ids (p,)."""
        return " ".join(WORDS[token_id] for token_id in map(int, ids))


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Facts:
    """Who is whose boss, and whose friend: each relation is one random cycle, so that no chain meets itself.

    A document's position is `len(PEOPLE)` times its relation, plus its person. Questions come in the same order.

    Example:
        >>> facts = Facts.draw(seed=0)
        >>> documents, questions = facts.documents(), facts.questions(hops=3)
        >>> documents.texts[0], questions.texts[0]
        ("Ana's boss is Jo", "Ana's boss's boss's boss is Bo")
        >>> [documents.texts[place] for place in facts.chains(hops=3)[0].tolist()]
        ["Ana's boss is Jo", "Jo's boss is Fay", "Fay's boss is Bo"]
    """

    leads_to: Tensor
    """The person that each relation leads to from each person, (relations, people)."""

    @classmethod
    def draw(cls, seed: int = 0) -> Facts:
        """Draw the facts; the same seed gives the same ones."""
        generator = torch.Generator().manual_seed(seed)
        cycles = []
        for _ in RELATIONS:
            order = torch.randperm(len(PEOPLE), generator=generator)
            leads_to = torch.empty_like(order)
            leads_to[order] = order.roll(-1)
            cycles.append(leads_to)
        return cls(torch.stack(cycles))

    def documents(self) -> Sentences:
        """Return the facts, one a row."""
        return self._sentences(hops=1)

    def questions(self, hops: int) -> Sentences:
        """Return what stands that many hops from each person along each relation; only the answer is a label.

        Raises:
            ValueError: If `hops` is no positive integer.
        """
        check_integer("hops", hops, minimum=1)
        questions = self._sentences(hops)
        questions.labels[:, 1:] = IGNORED
        return questions

    def chains(self, hops: int) -> Tensor:
        """Return the documents that each question's answer rests on, in order: (q, hops)."""
        first_documents = len(PEOPLE) * torch.arange(len(RELATIONS)).unsqueeze(1)
        passed = [torch.arange(len(PEOPLE)).expand(len(RELATIONS), -1)]
        for _ in range(hops - 1):
            passed.append(self.leads_to.gather(1, passed[-1]))
        places = [(people + first_documents).flatten() for people in passed]
        return torch.stack(places, dim=1)

    def _sentences(self, hops: int) -> Sentences:
        last_documents = self.chains(hops)[:, -1]
        answers = self.leads_to.flatten()[last_documents].tolist()
        texts, input_ids, labels = [], [], []
        for place, answer in enumerate(answers):
            relation, person = divmod(place, len(PEOPLE))
            possessives = f"'s {RELATIONS[relation]}" * hops
            texts.append(f"{PEOPLE[person]}{possessives} is {PEOPLE[answer]}")
            words = [len(PEOPLE), len(PEOPLE) + 1 + relation]
            input_ids.append([person, *words])
            labels.append([answer, *words])
        return Sentences(texts, torch.tensor(input_ids), torch.tensor(labels))
