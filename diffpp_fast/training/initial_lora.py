"""The LoRA file that a role begins with: folded into its weights, or kept as the adapter that is trained.

And what a raw configuration leaves open of a role's adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.families import family_named
from diffpp_fast.networks.loading import is_file, network_shapes, read_config
from diffpp_fast.networks.lora_files import LoraFile, endings, modules_of, read_lora
from diffpp_fast.training.config import Fake, InitialLora, Lora, Models
from diffpp_fast.training.inputs import digest_of

#: The roles that may begin with one.
ROLES = ("generator", "fake")


class Opened(NamedTuple):
    """A LoRA file, what the configuration says of it, and a digest of its content."""

    file: LoraFile
    section: InitialLora
    digest: str

    def describe(self) -> str:
        """Say which it is and what becomes of it."""
        section, layers = self.section, self.file.layers
        ranks = sorted({update.rank for update in layers.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        scale = "" if section.scale == 1.0 else f", scale {section.scale:g}"
        text = f"; {self.file.text} tensors of text encoders are left out" if self.file.text else ""
        return (
            f"the LoRA {section.path} (digest {self.digest}), rank {rank} on {len(layers)} layers{scale}, "
            f"{'kept as its adapter' if section.keep else 'merged into its weights'}{text}"
        )

    def adapter(self, shapes: Mapping[str, Any]) -> Lora:
        """Return the settings of an adapter that goes on from the file. Raises ValueError where ranks differ."""
        rank, alpha, layers = self.file.uniform()
        return Lora(rank=rank, alpha=alpha * self.section.scale, targets=endings(layers, modules_of(shapes)))


def open_lora(section: InitialLora, configuration: str) -> Opened:
    """Return a LoRA for the network of a folder or hub id; raises like `read_lora`."""
    file = read_lora(section.path, read_config(configuration), network_shapes(configuration), section.alpha)
    return Opened(file, section, digest_of(file.facts(), file.tensors()))


def open_role_lora(models: Models, role: str) -> Opened | None:
    """Return the LoRA that a role begins with; None for none.

    Raises ConfigurationError, naming the key, for one that can't be read or does not fit, and for an adapter in the
    configuration that is not the file's.
    """
    section: Fake = getattr(models, role)
    if section.initial_lora is None:
        return None
    key = f"models.{role}.initial_lora"
    try:
        configuration = models.reference.path if section.path is None or is_file(section.path) else section.path
        opened = open_lora(section.initial_lora, configuration)
        if section.initial_lora.keep:
            own = opened.adapter(network_shapes(configuration))
            if section.lora != own:
                raise ValueError(
                    f"with keep=true the file's own adapter is trained, of rank {own.rank} and alpha {own.alpha:g}: "
                    f"remove models.{role}.lora, or merge the file with keep=false"
                )
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{key} ({section.initial_lora.path}): {error}") from error
    return opened


def fill_lora(data: dict[str, Any], source: Path) -> None:
    """Fill in `lora` of the roles that keep the LoRA file that they begin with: its rank, alpha and layers.

    Args:
        data: a raw configuration, with absolute paths; what it gives wrongly is left to the schema.
        source: for messages.

    Raises ConfigurationError for a file that can't be read or does not fit.
    """
    for role, section, reference in _sections(data):
        initial = section.get("initial_lora")
        if not isinstance(initial, dict) or initial.get("keep") is not True or section.get("lora") is not None:
            continue
        path = section.get("path")
        configuration = reference if path is None or is_file(path) else path
        try:
            given = InitialLora.model_validate(initial)
        except ValidationError:
            continue
        try:
            adapter = open_lora(given, configuration).adapter(network_shapes(configuration))
        except (ValueError, OSError) as error:
            raise ConfigurationError(f"{source}: models.{role}.initial_lora ({given.path}): {error}") from error
        section["lora"] = adapter.model_dump(mode="json")


def fill_targets(data: dict[str, Any]) -> None:
    """Fill in `lora.targets` of the roles whose network's family has targets of its own.

    Args:
        data: as for `fill_lora`. Networks that can't be read are left to whoever builds them.
    """
    for _, section, reference in _sections(data):
        lora, path = section.get("lora"), section.get("path")
        if not isinstance(lora, dict) or "targets" in lora:
            continue
        try:
            kind = read_config(reference if path is None or is_file(path) else path).get("_class_name")
        except (ValueError, OSError):
            continue
        family = family_named(kind)
        if family is not None:
            lora["targets"] = list(family.lora_targets)


def _sections(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The roles' sections, and the reference's path."""
    models = data.get("models")
    sections = models if isinstance(models, dict) else {}
    reference = sections.get("reference")
    path = reference.get("path") if isinstance(reference, dict) else None
    for role in ROLES:
        section = sections.get(role)
        if isinstance(section, dict) and isinstance(path, str) and isinstance(section.get("path"), str | None):
            yield role, section, path
