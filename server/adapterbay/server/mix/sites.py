"""Every place of a base that an adapter can change: found once, wrapped, filled and emptied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.adapters.forms import LM_HEAD, Bottleneck, NormForm, ServingForm, lasting_key
from adapterbay.server.mix.attention import PromptStore
from adapterbay.server.mix.axes import TokenAxis
from adapterbay.server.mix.linear import LinearSite, MixedLinear
from adapterbay.server.mix.norm import MixedNorm
from adapterbay.server.mix.pools import DOUBLING
from adapterbay.server.mix.table import MixedTable
from adapterbay.server.packed import PackedLinear


@dataclass(slots=True)
class Sites:
    """The wrapped modules by backbone-relative path; the language-model head is LM_HEAD.

    Norms are wrapped while an adapter that changes them is resident, so that nobody else pays for it.
    """

    backbone: nn.Module
    dtype: torch.dtype
    device: torch.device
    linears: dict[str, MixedLinear] = field(default_factory=dict)
    tables: dict[str, MixedTable] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    token_axes: dict[str, TokenAxis] = field(default_factory=dict)  # of norms: where it is known
    apart: set[str] = field(default_factory=set)  # linear layers that do not get one vector for each token
    head_name: str | None = None  # what the base itself calls its language-model head
    prompts: PromptStore | None = None
    growth: float = DOUBLING  # of pools
    slack_bytes: float = math.inf  # pools whose free rows take more give them back
    free_bytes: int = 0  # what the free rows of all pools take
    version: int = 0  # another one whenever what is resident has changed
    _mixed_norms: dict[str, MixedNorm] = field(default_factory=dict)
    _norm_users: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def wrap(cls, backbone: nn.Module, dtype: torch.dtype, device: torch.device, *, packs: bool) -> Sites:
        """Puts a MixedLinear in the place of every linear layer of the backbone (bitsandbytes' and GPT-2's Conv1D too)
        and a MixedTable in that of its input embedding.

        `packs`: plain layers' weights go into oneDNN's layout, and out of their own.
        """
        sites = cls(backbone, dtype, device)
        embedding = backbone.get_input_embeddings()  # type: ignore[operator]
        for path, module in list(backbone.named_modules()):
            if isinstance(module, Conv1D | nn.Linear):
                made = PackedLinear(module) if packs and type(module) is nn.Linear else module
                sites.linears[path] = MixedLinear(made, *features(module), path)
                _put(backbone, path, sites.linears[path])
            elif module is embedding and path:
                sites.tables[path] = MixedTable(module, path, dtype)
                _put(backbone, path, sites.tables[path])
            elif is_norm(module):
                sites.norms[path] = module
        return sites

    def wrap_head(self, head: nn.Module, name: str) -> MixedLinear:
        """The wrapper of the language-model head, which the base calls `name`, for the caller to put in its place."""
        self.head_name = name
        wrapped = MixedLinear(head, *features(head), LM_HEAD, head=True)
        self.linears[LM_HEAD] = wrapped
        return wrapped

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear layer."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self.linears.items()}

    def check(self, form: ServingForm) -> None:
        """Raises UnsupportedMethod for a form that changes a module in which tokens cannot be told apart."""
        norms = form.norms.keys() | (form.bottlenecks.keys() & self.norms.keys())
        layers = form.layers.keys() | form.lasting.keys() | form.bottlenecks.keys()
        strange = sorted((norms - self.token_axes.keys()) | (layers & self.apart))
        if strange:
            raise UnsupportedMethod(
                f"{form.manifest.peft_type} on {strange[0]} is not served (of {len(strange)} such modules): what that "
                "module of the base gets does not show which token it belongs to, and the adapter would reach other "
                "texts. Leave it out.",
                metadata={"peft_type": form.manifest.peft_type, "module": strange[0]},
            )

    def place(self, key: str, form: ServingForm) -> None:
        """Copies one adapter to the device, under `key`."""
        for _ in self.placing(key, form):
            pass

    def placing(self, key: str, form: ServingForm) -> Iterator[int]:
        """The same module by module: each step of the iterator fills one and says how many bytes it wrote there. Nobody
        may use `key` before the end; `remove` takes away what there is of it."""
        if form.lasts:
            yield from self.placing(lasting_key(key), form.lasting_part)
            form = form.activated_part
        if self.free_bytes > self.slack_bytes:
            yield from self._trimming()
        for path in form.layers.keys() | (form.bottlenecks.keys() - self.norms.keys()):
            self.version += 1
            layer, own = self.linears[path], form.layers.get(path)
            if layer.site is None:
                layer.site = LinearSite(layer.in_features, layer.out_features, self.dtype, self.device)
            pool = layer.site.pool
            store, before = pool.a, pool.bytes
            with self._counted(layer.site):
                layer.site.place(key, own, form.bottlenecks.get(path), growth=self.growth)
            written = sum(tensor.nbytes for tensor in own.tensors()) if own is not None else 0
            yield written + (before if pool.a is not store else 0)  # a pool that moved was copied
            if self.free_bytes > self.slack_bytes:
                yield from self._trimming()
        for path, table in form.tables.items():
            self.version += 1
            self.tables[path].place(key, table)
            yield sum(tensor.nbytes for tensor in table.tensors())
        for path in form.norms.keys() | (form.bottlenecks.keys() & self.norms.keys()):
            self.version += 1
            self._place_norm(key, path, form.norms.get(path), form.bottlenecks.get(path))
            yield 0
        self.version += 1
        for index, prompt in form.attention.items():
            if self.prompts is None:
                self.prompts = PromptStore(self.device, self.backbone)
            self.prompts.place(key, index, prompt)

    def remove(self, key: str, form: ServingForm) -> None:
        """Takes it away again."""
        if form.lasts:
            self.remove(lasting_key(key), form.lasting_part)
            form = form.activated_part
        self.version += 1
        for path in form.layers.keys() | (form.bottlenecks.keys() - self.norms.keys()):
            site = self.linears[path].site
            if site is not None:
                with self._counted(site):
                    site.remove(key)
        for path in form.tables:
            self.tables[path].remove(key)
        if self.prompts is not None:
            self.prompts.remove(key)
            if not self.prompts.used:
                self.prompts = None
        for path in form.norms.keys() | (form.bottlenecks.keys() & self.norms.keys()):
            if path not in self._mixed_norms:
                continue  # a removal before it was whole
            self._mixed_norms[path].remove(key)
            self._norm_users[path].discard(key)
            if not self._norm_users[path]:
                _put(self.backbone, path, self.norms[path])
                del self._mixed_norms[path], self._norm_users[path]

    def _trimming(self) -> Iterator[int]:
        """Gives the free rows of all pools back, layer by layer: each step says how many bytes were copied for it."""
        for site in [layer.site for layer in self.linears.values() if layer.site is not None]:
            with self._counted(site):
                moved = [pool.bytes for pool in site.pools if pool.trim()]
            if moved:
                self.version += 1
                yield sum(moved)

    @contextmanager
    def _counted(self, site: LinearSite) -> Iterator[None]:
        """Keeps `free_bytes` right, also when only some of the site's pools have changed before an error."""
        free = site.free_bytes
        try:
            yield
        finally:
            self.free_bytes += site.free_bytes - free

    def _place_norm(self, key: str, path: str, form: NormForm | None, bottleneck: Bottleneck | None) -> None:
        if path not in self._mixed_norms:
            self._mixed_norms[path] = MixedNorm(self.norms[path], path, self.device, self.token_axes[path])
            self._norm_users[path] = set()
            _put(self.backbone, path, self._mixed_norms[path])
        self._mixed_norms[path].place(key, form, bottleneck)
        self._norm_users[path].add(key)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, of whatever kind."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer with parameters: a leaf with one weight vector."""
    weight = module._parameters.get("weight")
    return not list(module.children()) and isinstance(weight, Tensor) and weight.dim() == 1


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
