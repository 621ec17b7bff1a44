"""A registry behind the Hugging Face Hub's HTTP API: the self-hosted hub for adapters.

With `HF_ENDPOINT` set to it, an unmodified `huggingface_hub`, `hf`, `peft` or `transformers` pushes and pulls versions.
Everything that comes in passes the same admission as `registry push`. `app.make_app(ServeSettings(…))` is the ASGI app.

    settings    what the operator decides                 tokens, auth    who may do what
    app         the routes                                problems        errors as the clients show them
    reading     model info, trees, refs, history          resolve         bytes of files, with ranges
    writing     repositories, tags, commits               lfs             large files
    ndjson      the commit body, parsed as it streams     absent          what is not implemented, and says so
    repository  the one door to the local store           trees           what a commit makes of a tree
    incoming    a commit on its way in, or refused        beside          adapters below the root, admitted too

Starlette and uvicorn are imported here only: `pip install 'adapterbay[registry-server]'`.
"""

from __future__ import annotations
