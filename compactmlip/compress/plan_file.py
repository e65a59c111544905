"""A plan: what to keep of a model, as a file that people can read and compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compactmlip.channels import Channels, format_channels, parse_channels
from compactmlip.checkpoint import atomic_write_text
from compactmlip.compress.plan import parse_target
from compactmlip.errors import InputError


class Plan(BaseModel):
    """Channels to keep in each layer and order; which ones, the scores say.

    As JSON each layer has a line of its own, so that two plans can be compared line by line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    layers: tuple[str, ...] = Field(min_length=1, description="channels per order, for instance 64x0+32x1")
    edge_order: int | None = Field(None, ge=0, description="largest order of the harmonics of edges")
    radial_hidden: int | None = Field(None, ge=1, description="units to keep in the radial networks")
    readout_hidden: int | None = Field(None, ge=1, description="units to keep in the readout")
    odd_paths: bool = Field(False, description="keep paths that break inversion symmetry")
    without_paths: tuple[str, ...] = Field((), description="single paths to cut, as layers.1.path/0-1-1")
    cutoffs: tuple[float | None, ...] | None = Field(
        None, description="of each layer in Angstrom; null, and by default, the model's"
    )
    importance: str = Field("taylor", description="criterion that ranks channels")
    made_by: dict[str, Any] = Field(default_factory=dict, description="how the plan came about")

    @field_validator("layers")
    @classmethod
    def _readable(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(format_channels(parse_channels(layer)) for layer in layers)

    @field_validator("cutoffs")
    @classmethod
    def _none_if_whole(cls, cutoffs: tuple[float | None, ...] | None) -> tuple[float | None, ...] | None:
        return None if cutoffs is None or all(c is None for c in cutoffs) else cutoffs

    @field_validator("without_paths")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(names)))

    @model_validator(mode="after")
    def _one_cutoff_for_each_layer(self) -> Plan:
        if self.cutoffs is not None and len(self.cutoffs) != len(self.layers):
            raise ValueError(f"{len(self.cutoffs)} cutoffs for {len(self.layers)} layers")
        return self

    @classmethod
    def of(cls, channels: Sequence[Channels], **options: Any) -> Plan:
        """Plan with these channels per order in each layer."""
        return cls(layers=tuple(format_channels(c) for c in channels), **options)

    @classmethod
    def uniform(cls, text: str, num_layers: int, **options: Any) -> Plan:
        """Plan of a target as ``--to`` has it: for all layers, or one per layer separated by commas.

        Raises
        ------
        InputError
            If the text is malformed or lists another number of layers.
        """
        return cls.of(parse_target(text, num_layers), **options)

    @property
    def target(self) -> str:
        """The layers as ``--to`` takes them."""
        return ",".join(self.layers)

    @property
    def summary(self) -> str:
        """One line for people: the channels, and what else is cut."""
        edges = "" if self.edge_order is None else f", edges l <= {self.edge_order}"
        number = len(self.without_paths)
        paths = f", without {number} path{'s' if number > 1 else ''}" if number else ""
        return f"{self.target}{edges}{paths}{self._short}"

    @property
    def _short(self) -> str:
        """The cutoffs, if there are any."""
        if self.cutoffs is None:
            return ""
        return ", cutoffs " + " ".join("-" if c is None else f"{c:g}" for c in self.cutoffs)

    @property
    def channels(self) -> tuple[Channels, ...]:
        """Channels per order for each layer."""
        return tuple(parse_channels(layer) for layer in self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`compactmlip.compress.plan.target_sizes` takes besides the channels."""
        names = ("edge_order", "radial_hidden", "readout_hidden", "odd_paths", "without_paths")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """JSON without options that are left at their defaults."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps({"version": self.version, **data}, indent=1) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write ``*.json``.

        Raises
        ------
        CheckpointError
            If the file cannot be written.
        """
        path = Path(path)
        atomic_write_text(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises
        ------
        InputError
            If there is no such file or it is no plan; the message says which entry is wrong.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read the plan {path}: {error}.") from error
        if not isinstance(data, Mapping):
            raise InputError(f"{path}: expected a plan, which is a JSON object with the entry 'layers'.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise InputError(f"{path}: {where}: {first['msg']}.") from error
