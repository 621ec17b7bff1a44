"""Making keys and signing versions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from adapterbay.registry.cli.common import JsonOption, ReferenceArgument, RegistryOption, app, existing
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.keys import generate_key_pair, needs_password
from adapterbay.registry.signing import sign as sign_snapshot
from adapterbay.registry.signing import signer_of
from adapterbay.registry.tables import write

PASSWORD_VARIABLE: Final = "ADAPTERBAY_KEY_PASSWORD"


@app.command()
@guarded()
def keygen(
    private: Annotated[Path, typer.Argument(metavar="KEY", help="The private key's file; the public one is KEY.pub.")],
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help=f"Protect it with a password ({PASSWORD_VARIABLE}, else asked for).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key pair for signing: KEY to keep, KEY.pub to hand out."""
    public = private.with_name(f"{private.name}.pub")
    password = _password("New password", confirm=True) if encrypt else None
    if encrypt and not password:
        raise InvalidArgument(f"There is no password to encrypt {private} with: set {PASSWORD_VARIABLE}.")
    fingerprint = generate_key_pair(private, public, password)
    if as_json:
        write_json({"private_key": private, "public_key": public, "fingerprint": fingerprint})
    else:
        write([f"private key  {private}", f"public key   {public}", f"fingerprint  {fingerprint}"])


@app.command()
@guarded()
def sign(
    reference: ReferenceArgument,
    key: Annotated[
        Path,
        typer.Option("--key", metavar="KEY", help=f"Your private key (password: {PASSWORD_VARIABLE}, else asked for)."),
    ],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Vouch for a version with your private key."""
    store = existing(registry)
    found = store.resolve(reference)
    password = _password(f"Password of {key}") if needs_password(key) else None
    bundle = sign_snapshot(store.open_snapshot(found.digest), key, password)
    fingerprint = signer_of(bundle)
    store.attach_signature(found.name, found.version, bundle, key=fingerprint)
    if as_json:
        write_json({"name": found.name, "version": found.version, "digest": found.digest, "key": fingerprint})
    else:
        write([f"{found.name}@{found.version} {found.digest} is signed with {fingerprint}"])


def _password(question: str, *, confirm: bool = False) -> str | None:
    """From the environment, or asked for where somebody can answer; None where nobody can."""
    given = os.environ.get(PASSWORD_VARIABLE)
    if given or not sys.stdin.isatty():
        return given
    return str(typer.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True))
