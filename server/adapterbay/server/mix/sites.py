"""Every place of a base that an adapter can change: found once, wrapped, filled and emptied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.server.adapters.forms import LM_HEAD, Bottleneck, NormForm, ServingForm
from adapterbay.server.mix.attention import PromptStore
from adapterbay.server.mix.linear import LinearSite, MixedLinear
from adapterbay.server.mix.norm import MixedNorm
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
    head_name: str | None = None  # what the base itself calls its language-model head
    prompts: PromptStore | None = None
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

    def place(self, key: str, form: ServingForm) -> None:
        """Copies one adapter to the device, under `key`."""
        for _ in self.placing(key, form):
            pass

    def placing(self, key: str, form: ServingForm) -> Iterator[int]:
        """The same module by module: each step of the iterator fills one and says how many bytes it wrote there. Nobody
        may use `key` before the end; `remove` takes away what there is of it."""
        for path in form.layers.keys() | (form.bottlenecks.keys() - self.norms.keys()):
            self.version += 1
            layer, own = self.linears[path], form.layers.get(path)
            if layer.site is None:
                layer.site = LinearSite(layer.in_features, layer.out_features, self.dtype, self.device)
            pool = layer.site.pool
            before = pool.bytes
            layer.site.place(key, own, form.bottlenecks.get(path))
            written = sum(tensor.nbytes for tensor in own.tensors()) if own is not None else 0
            yield written + (before if pool.bytes > before else 0)  # a pool that grew was copied
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
        self.version += 1
        for path in form.layers.keys() | (form.bottlenecks.keys() - self.norms.keys()):
            site = self.linears[path].site
            if site is not None:
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

    def _place_norm(self, key: str, path: str, form: NormForm | None, bottleneck: Bottleneck | None) -> None:
        if path not in self._mixed_norms:
            self._mixed_norms[path] = MixedNorm(self.norms[path], path, self.device)
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


def parameter_shapes(norms: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of every norm's parameters, by path and name."""
    return {
        path: {name: tuple(p.shape) for name, p in norm._parameters.items() if p is not None}
        for path, norm in norms.items()
    }


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
