"""What `--registry PLACE` means, and ADAPTERBAY_REGISTRY with it: a folder, the Hub, or a name of the user's own.

PLACE   what it is
hub:ORG, hub:ORG/REPO    the repositories of an organization or user on the Hub, or one of them
NAME                     a section of `registries.toml` under `home()`
anything else            a folder

# ~/.adapterbay/registries.toml
[prod]
place = "hub:acme"                    # or a folder: absolute, or from ~
endpoint = "https://hub.internal"     # only with hub: another server that speaks the Hub's protocol
token_env = "ACME_TOKEN"              # only with hub: the variable that holds the token
private = true                        # only with hub: for the repositories that a push creates
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from adapterbay.registry.backend import Backend
from adapterbay.registry.errors import InvalidArgument, RegistryNotFound
from adapterbay.registry.hub.names import Namespace
from adapterbay.registry.local.store import Registry
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.paths import expanded, home
from adapterbay.registry.reference import HubReference

REGISTRY_VARIABLE: Final = "ADAPTERBAY_REGISTRY"
CONFIG_FILE: Final = "registries.toml"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class NamedRegistry(BaseModel):
    """One section of `registries.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    place: str
    endpoint: str | None = None
    token_env: str | None = None
    private: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> NamedRegistry:
        if is_hub(self.place):
            Namespace.parse(self.place)
            if self.endpoint is not None and not self.endpoint.startswith(("https://", "http://")):
                raise ValueError(f"endpoint {self.endpoint!r} is not a URL: it begins with https:// or http://")
            if self.token_env is not None and _VARIABLE.fullmatch(self.token_env) is None:
                raise ValueError("token_env is the name of an environment variable, not the token")
            return self
        if not Path(self.place).expanduser().is_absolute():
            raise ValueError(f"place {self.place!r} is neither hub:ORG nor an absolute folder")
        extra = [key for key in ("endpoint", "token_env", "private") if getattr(self, key) is not None]
        if extra:
            raise ValueError(f"{', '.join(extra)} belong to a hub: place only")
        return self


def config_path() -> Path:
    """Where the named registries are written down."""
    return home() / CONFIG_FILE


def named_registries() -> dict[str, NamedRegistry]:
    """The named registries, sorted by name. Raises InvalidArgument with everything that is wrong in the file."""
    path = config_path()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} is not readable TOML: {error}.", field="registry") from error
    found, problems = _sections(document)
    if problems:
        raise InvalidArgument(f"{path} has {len(problems)} mistakes: {'; '.join(problems)}.", field="registry")
    return found


def _sections(document: Mapping[str, object]) -> tuple[dict[str, NamedRegistry], list[str]]:
    found: dict[str, NamedRegistry] = {}
    problems: list[str] = []
    for name, section in sorted(document.items()):
        if not isinstance(section, dict):
            problems.append(f"{name}: it stands outside of a [section]")
            continue
        if _NAME.fullmatch(name) is None:
            problems.append(f"[{name}]: a name holds only a-z, 0-9, '_' and '-'")
        try:
            found[name] = NamedRegistry.model_validate(section)
        except ValidationError as error:
            for each in error.errors():
                place = ".".join(str(part) for part in each["loc"])
                problems.append(f"[{name}] {place + ': ' if place else ''}{each['msg'].removeprefix('Value error, ')}")
        except InvalidArgument as error:
            problems.append(f"[{name}] {error.message.rstrip('.')}")
    return found, problems


def is_hub(place: str) -> bool:
    """Whether a place is on the Hub, by its spelling."""
    return place.startswith("hub:")


def open_registry(place: str | Path | None, *, create: bool) -> Backend:
    """Opens what `place` names; None means ADAPTERBAY_REGISTRY, else `registry` under `home()`. A Path is a folder.

    `create` makes a local registry that is not there; repositories on the Hub are made by their first push. Raises
    InvalidArgument (an ambiguous name, a mistake in `registries.toml`), RegistryNotFound or Unavailable.
    """
    if isinstance(place, Path):
        return Registry.open(place, create=create)
    place = place or _default()
    if is_hub(place):
        return _hub(place, NamedRegistry(place=place))
    chosen = _named(place, create)
    if chosen is None:
        return Registry.open(place, create=create)
    return _hub(place, chosen) if is_hub(chosen.place) else Registry.open(chosen.place, create=create)


def folder_of(place: str | None, *, create: bool) -> Path:
    """The folder that `place` names, for what works on a folder alone; None and `create` are as in `open_registry`.

    It need not be there. Raises InvalidArgument for a place on the Hub, and as `open_registry` does for names.
    """
    place = place or _default()
    chosen = None if is_hub(place) else _named(place, create)
    folder = place if chosen is None else chosen.place
    if is_hub(folder):
        raise InvalidArgument(f"{place} is on a Hub: this works on a local registry only.", field="registry")
    return expanded(folder)


def _default() -> str:
    return os.environ.get(REGISTRY_VARIABLE) or str(home() / "registry")


def _named(place: str, create: bool) -> NamedRegistry | None:
    """The named registry that `place` means; None for a folder. Raises as `open_registry` does."""
    named = named_registries()
    chosen = named.get(place)
    if chosen is None:
        if _NAME.fullmatch(place) and not Path(place).exists():
            near = nearest_words(place, named)
            if near or not create:  # a slip of the pen makes no folder
                raise RegistryNotFound(
                    f"There is no registry {place}: neither a folder here nor a name in {config_path()}. For a new "
                    f"folder write ./{place}.",
                    near=near,
                )
        return None
    if Path(place).exists():
        raise InvalidArgument(
            f"{place!r} is a registry in {config_path()} and a folder here: write ./{place} for the folder.",
            field="registry",
        )
    return chosen


def open_for(reference: str, place: str | Path | None) -> tuple[Backend, str]:
    """The backend that a reference belongs to, and the reference as that backend spells it.

    `hub:ORG/REPO@…` is looked for on the Hub: on the endpoint and with the token of `place` if that is on the Hub too,
    else by huggingface_hub's own settings. Anything else belongs to `place`. Raises as `open_registry` does.
    """
    if not is_hub(reference):
        return open_registry(place, create=False), reference
    wanted = HubReference.parse(reference)
    spelled = str(wanted).removeprefix("hub:")
    name = place or os.environ.get(REGISTRY_VARIABLE)
    chosen = named_registries().get(name) if isinstance(name, str) else None
    repository = f"hub:{wanted.org}/{wanted.repo}"
    if chosen is not None and is_hub(chosen.place):
        return _hub(str(name), chosen.model_copy(update={"place": repository})), spelled
    return _hub(repository, NamedRegistry(place=repository)), spelled


def _hub(name: str, chosen: NamedRegistry) -> Backend:
    from adapterbay.registry.hub.backend import HubRegistry  # huggingface_hub takes a while to load

    token = None
    if chosen.token_env is not None:
        token = os.environ.get(chosen.token_env)
        if not token:
            raise InvalidArgument(
                f"The registry {name} takes its token from {chosen.token_env}, which is not set: set it.",
                field="registry",
            )
    return HubRegistry(chosen.place, endpoint=chosen.endpoint, token=token, private=chosen.private)
