"""The judges that a config can name: an endpoint, a model in this process, and the world's oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BeforeValidator
from torch import nn

from mmalign.config import Choice, build, short_form
from mmalign.core.reference import STORED_VALUES
from mmalign.core.types import Prompt, Sample, Unusable
from mmalign.feedback import KINDS, Answer, EndpointJudge, EndpointSettings, Judge, Template
from mmalign.jobs import models
from mmalign.modalities.lvlm import LvlmModality, LvlmSampling, LvlmSettings
from mmalign.world import parse_image
from mmalign.world.description import claim_of, parse_description

# tokens of an answer that begins with yes or no
SHORT = 16
# tokens of a list of facts
LONG = 1024
WORDS = ("Yes", "yes", "No", "no")


@dataclass(frozen=True, kw_only=True)
class OracleSettings:
    # exact, for descriptions and pictures of the embedded world alone
    kind: Literal["oracle"] = "oracle"


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    # a vision-language model in this process; it lists facts as well
    kind: Literal["local"] = "local"
    model: LvlmSettings = field(default_factory=LvlmSettings)
    # of the weights and of what is computed
    dtype: Literal["float32", "bfloat16"] = "float32"
    # tokens of the longest list of facts; yes and no are told by their probabilities alone
    max_tokens: int = LONG
    # questions at a time
    batch_size: int = 8


JUDGES: Mapping[str, type] = {"endpoint": EndpointSettings, "local": LocalSettings, "oracle": OracleSettings}
JudgeSettings = EndpointSettings | LocalSettings | OracleSettings
_CHOICE = Choice(JUDGES)


def _built(section: Any) -> Any:
    return build(_CHOICE.pick("judge", {"judge": section}), section) if isinstance(section, Mapping) else section


# a section with a kind; a plain word, `facts: oracle`, is the kind
JudgeSection = Annotated[JudgeSettings, _CHOICE, BeforeValidator(_built), short_form("kind")]


class Loader:
    """Judges from settings; a model that two of them name is loaded once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._models: dict[tuple[LvlmSettings, str], tuple[LvlmModality, nn.Module]] = {}

    def lister(self, settings: JudgeSettings, prompt: Template) -> Judge:
        """The judge that lists facts."""
        if isinstance(settings, EndpointSettings):
            return EndpointJudge(replace(settings, max_tokens=settings.max_tokens or LONG, log_probs=False))
        if isinstance(settings, LocalSettings):
            return LocalJudge(settings, *self._model(settings), yes_or_no=False)
        return FactsOracle(prompt)

    def verifier(self, settings: JudgeSettings, prompt: Template) -> Judge:
        """The judge that says yes or no."""
        if isinstance(settings, EndpointSettings):
            return EndpointJudge(replace(settings, max_tokens=settings.max_tokens or SHORT))
        if isinstance(settings, LocalSettings):
            return LocalJudge(settings, *self._model(settings), yes_or_no=True)
        return TruthOracle(prompt)

    def _model(self, settings: LocalSettings) -> tuple[LvlmModality, nn.Module]:
        key = (settings.model, settings.dtype)
        if key not in self._models:
            modality, network = models.load(settings.model, self._device, getattr(torch, settings.dtype))
            assert isinstance(modality, LvlmModality)
            self._models[key] = (modality, network.eval().requires_grad_(False))
        return self._models[key]


@final
class LocalJudge:
    """A vision-language model of this process. Asked for yes or no, it writes nothing: log P(word | question) of four
    spellings decides. Else it answers greedily. A question that does not fit the model is refused, alone."""

    def __init__(self, settings: LocalSettings, modality: LvlmModality, network: nn.Module, *, yes_or_no: bool):
        self._settings, self._modality, self._network = settings, modality, network
        self._yes_or_no = yes_or_no
        self._weights = modality.reference_fingerprint(network)

    @property
    def name(self) -> str:
        model = self._settings.model
        return model.path if model.adapter is None else f"{model.path} with {model.adapter}"

    @property
    def identity(self) -> Mapping[str, Any]:
        asked = "yes or no" if self._yes_or_no else self._settings.max_tokens
        return {"weights": self._weights, "answers": asked}

    def cautions(self) -> list[str]:
        return []

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """In their order, batch by batch."""
        size = self._settings.batch_size
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            try:
                found = self._answers(batch)
            except Unusable:
                found = [self._answer(question) for question in batch]
            yield from enumerate(found, start)

    def _answer(self, question: Prompt) -> Answer:
        try:
            return self._answers([question])[0]
        except Unusable as error:
            return Answer(error.message, failure=error.kind)

    def _answers(self, questions: Sequence[Prompt]) -> list[Answer]:
        return self._verdicts(questions) if self._yes_or_no else self._texts(questions)

    def _texts(self, questions: Sequence[Prompt]) -> list[Answer]:
        sampling = LvlmSampling(
            temperature=0.0, max_new_tokens=self._settings.max_tokens, batch_size=self._settings.batch_size
        )
        samples = self._modality.generate(self._network, questions, [0] * len(questions), sampling)
        return [Answer(sample.text or "") for sample in samples]

    def _verdicts(self, questions: Sequence[Prompt]) -> list[Answer]:
        samples = [
            Sample(str(place), question.text, place, 0, prompt_images=question.images, text=word)
            for place, question in enumerate(questions)
            for word in WORDS
        ]
        # What ends the turn is left out: the answer may go on.
        end = len(self._modality.prompts.end_ids)
        rows = [row[STORED_VALUES] for row in self._modality.reference_tensors(self._network, samples)]
        values = [float(row[: len(row) - end].sum()) for row in rows]
        return [
            Answer("", dict(zip(WORDS, values[start : start + len(WORDS)], strict=True)))
            for start in range(0, len(values), len(WORDS))
        ]


def reads(prompt: Template) -> re.Pattern[str]:
    """A pattern that finds in a filled prompt what was filled in."""
    parts = re.split(r"\{(\w+)\}", prompt.text)
    return re.compile(
        "".join(f"(?P<{part}>.*)" if place % 2 else re.escape(part) for place, part in enumerate(parts)), re.DOTALL
    )


@final
class FactsOracle:
    """Lists the facts that a segment states in the world's grammar. A sentence outside it states none."""

    name = "oracle"

    def __init__(self, prompt: Template):
        self._asked = reads(prompt)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"oracle": "facts"}

    def cautions(self) -> list[str]:
        return []

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for place, question in enumerate(questions):
            asked = self._asked.fullmatch(question.text)
            if asked is None:
                raise ValueError(f"the oracle cannot read {question.text!r:.200}; it was made for another prompt")
            claims = [claim for statement in parse_description(asked["segment"]) for claim in statement.claims]
            facts = {kind: [claim.text for claim in claims if claim.kind == kind] for kind in KINDS}
            yield place, Answer(json.dumps(facts))


@final
class TruthOracle:
    """Says yes or no to a fact of the world, from the picture. It does not know what other facts mean."""

    name = "oracle"

    def __init__(self, prompt: Template):
        self._asked = reads(prompt)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"oracle": "truth"}

    def cautions(self) -> list[str]:
        return []

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        scenes: dict[int, Any] = {}
        for place, question in enumerate(questions):
            asked = self._asked.fullmatch(question.text)
            if asked is None:
                raise ValueError(f"the oracle cannot read {question.text!r:.200}; it was made for another prompt")
            picture = question.images[0]
            if id(picture) not in scenes:
                scenes[id(picture)] = parse_image(picture)
            yield place, Answer(_truth(asked["fact"], scenes[id(picture)]))


def _truth(fact: str, scene: Any) -> str:
    try:
        return "yes" if claim_of(fact).holds(scene) else "no"
    except ValueError:
        return "This is no fact of the world."
