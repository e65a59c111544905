"""What a model is, apart from its numbers: :class:`ModelSpec` and :class:`Provenance`.

Both are frozen, versioned and stored as JSON, in the header of a checkpoint and inside a deployed
file.  Engines read units, species, cutoff and precision from here and from nowhere else.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from ase.data import atomic_numbers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compactmlip.errors import CheckpointError, unknown_species_error

FORMAT_VERSION = 1
"""Version of the JSON layout written by this release."""

DTypeName = Literal["float32", "float64"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Units(_Frozen):
    """Units of every quantity that enters or leaves the model."""

    energy: Literal["eV"] = "eV"
    length: Literal["Angstrom"] = "Angstrom"


class Step(_Frozen):
    """One operation that was applied to a model: its name and its resolved options."""

    action: str
    options: dict[str, Any] = Field(default_factory=dict)


class Provenance(_Frozen):
    """Where a model comes from: name, source and licence of the teacher, and every step since."""

    name: str = "unnamed"
    source: str = "unknown"
    licence: str = "unknown"
    citation: str = ""
    parent_sha256: str | None = None
    steps: tuple[Step, ...] = ()

    def then(self, action: str, **options: Any) -> Provenance:
        """Return a copy with one more step."""
        return self.model_copy(update={"steps": (*self.steps, Step(action=action, options=options))})


class ModelSpec(_Frozen):
    """Everything about a model except its parameters.

    ``architecture`` is the JSON form of the family's own architecture class
    (for instance :class:`compactmlip.models.nequip.NequIPArchitecture`).
    """

    format_version: int = FORMAT_VERSION
    family: str
    species: tuple[str, ...]
    cutoff: float = Field(gt=0, description="Angstrom")
    dtype: DTypeName = "float32"
    units: Units = Units()
    num_message_passing_layers: int = Field(ge=0)
    architecture: dict[str, Any]
    provenance: Provenance = Provenance()

    @field_validator("species")
    @classmethod
    def _known_and_unique(cls, species: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [s for s in species if atomic_numbers.get(s, 0) == 0]
        if unknown or not species or len(set(species)) != len(species):
            raise ValueError(f"species must be distinct chemical symbols, got {species}")
        return species

    @property
    def receptive_field(self) -> float:
        """Distance in Angstrom beyond which an atom cannot change another atom's energy."""
        own = self._layer_cutoffs
        return self.cutoff * (self.num_message_passing_layers - len(own)) + sum(own)

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """The model's cutoff and those of its layers in Angstrom, each once, the longest one first."""
        return tuple(sorted({self.cutoff, *self._layer_cutoffs}, reverse=True))

    @property
    def _layer_cutoffs(self) -> list[float]:
        layers = self.architecture.get("layers", ())
        return [float(c) for layer in layers if (c := layer.get("cutoff")) is not None]

    def species_index(self, symbols: list[str], where: str = "the structure") -> list[int]:
        """Map chemical symbols to the model's species index.

        Raises
        ------
        SpeciesError
            If a symbol is not covered by the model.
        """
        index = {s: k for k, s in enumerate(self.species)}
        if not set(symbols) <= index.keys():
            raise unknown_species_error(symbols, self.species, where)
        return [index[s] for s in symbols]

    def to_json(self) -> str:
        """Return the JSON text that a checkpoint or a deployed file stores."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str, where: str = "model file") -> ModelSpec:
        """Parse :meth:`to_json`.

        Raises
        ------
        CheckpointError
            If the text is not a spec of this format version or an earlier one.
        """
        try:
            data = json.loads(text)
            version = data["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: holds no readable compactmlip spec ({error}).") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {version}, but this compactmlip reads up to {FORMAT_VERSION}. "
                "Upgrade compactmlip."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise CheckpointError(f"{where}: the spec is damaged: {error}") from error
