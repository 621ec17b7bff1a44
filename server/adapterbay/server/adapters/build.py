"""From an adapter's files to its serving form: admitted once more, against the very base that will serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from adapterbay.registry import AdmissionReport, Manifest
from adapterbay.registry.admission.arriving import Arriving, whole_of
from adapterbay.registry.admission.report import AdaptedModule, AdaptedSite, TrainedTokens
from adapterbay.registry.errors import NoEffect, Rejected, UnsupportedMethod
from adapterbay.registry.manifest import WEIGHTS_FILE
from adapterbay.server.adapters.finite import check_finite
from adapterbay.server.adapters.forms import (
    LM_HEAD,
    AttentionPrompt,
    LinearForm,
    NormForm,
    Prefix,
    Prompt,
    ServingForm,
    TableForm,
)
from adapterbay.server.adapters.views import tensor_views
from adapterbay.server.convert.attention import attention_prompt, attention_prompt_behind
from adapterbay.server.convert.bottleneck import bottleneck
from adapterbay.server.convert.copies import changed_base, check_copy, check_shape
from adapterbay.server.convert.effect import has_effect
from adapterbay.server.convert.lora import dora_form, embedding_factors, lora_form
from adapterbay.server.convert.read import read_layers
from adapterbay.server.convert.tables import check_tied, joined, replaced_rows, tied_head, whole_table
from adapterbay.server.convert.tree import dense_weight, peft_root
from adapterbay.server.convert.virtual import PREFIXES, PROMPTS, check_apart, read_prefix, read_prompt
from adapterbay.server.heads import head_from
from adapterbay.server.kernels.quantized import QuantizedLinear

if TYPE_CHECKING:
    from adapterbay.server.model import ServingModel

READ_DIRECTLY: Final = frozenset({"LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "BOTTLENECK"})
"""Methods that change no linear layer by a formula of their own."""


def build_form(manifest: Manifest, files: Mapping[str, bytes | Arriving], model: ServingModel) -> ServingForm:
    """Admits an adapter's files against the base at hand, and reads them.

    Raises what `adapterbay.registry.admit` raises, and UnsupportedMethod for what admission knows and this base or this
    engine has no place for.
    """
    report = model.admission.admit(files, labels=manifest.labels or None)
    with torch.no_grad():
        return _Builder(manifest, report, whole_of(files[WEIGHTS_FILE]), model).build()


class _Builder:
    """Collects what one adapter does to each place of the base."""

    def __init__(self, manifest: Manifest, report: AdmissionReport, weights: bytes, model: ServingModel) -> None:
        self._manifest = manifest
        self._report = report
        self._method = report.peft_type
        self._weights = weights
        self._tensors = tensor_views(weights, report.entries)
        self._model = model
        self._sites = model.sites
        self._prefix = str(model.base.model.base_model_prefix)
        self._layers: dict[str, LinearForm] = {}
        # What an adapter adds to layers beside its method's own tensors: PEFT never switches it off.
        self._lasting: dict[str, LinearForm] = {} if report.invocation else self._layers
        self._norms: dict[str, NormForm] = {}
        self._tables: dict[str, TableForm] = {}
        self._head_rows: TableForm | None = None

    def build(self) -> ServingForm:
        """The form. Raises NoEffect if nothing came together, or nothing but the base; Rejected (NOT_FINITE) for what
        the base's dtype cannot hold."""
        report = self._report
        virtual = self._virtual()
        check_tied(report, self._tensors, self._sites.tables)
        if self._method == "LORA" and self._formula_of_lora():
            self._take_lora()
        elif virtual is None and self._method not in READ_DIRECTLY:
            self._read_layers()
        for tokens in report.tokens:
            self._take_tokens(tokens)
        for site in report.saved:
            self._take_saved(site)
        for site in report.copies:
            self._check_copy(site)
        bottlenecks = {}
        attention = {}
        for site in report.sites:
            if self._method == "LN_TUNING":
                parts = {key.removeprefix("ln_tuning_layers."): t for key, t in self._of(site).items()}
                self._norms[self._norm(site.name)] = NormForm(parts)
            elif self._method == "BOTTLENECK":
                place = self._norm if site.kind == "norm" else self._linear
                bottlenecks[place(site.name)] = bottleneck(self._of(site), report.config)
            elif self._method == "ADAPTION_PROMPT":
                index, prompt = self._attention_prompt(site.name, self._of(site))
                attention[index] = prompt
        head = None
        if report.head is not None:
            parts = {name: self._tensors[key] for name, key in report.head.parts.items()}
            head = head_from(parts, self._model.base.files.config, self._manifest.task, self._manifest.labels)
        form = ServingForm(
            digest=self._manifest.digest,
            manifest=self._manifest,
            layers=self._layers,
            norms=self._norms,
            tables=self._tables,
            bottlenecks=bottlenecks,
            attention=attention,
            head=head,
            virtual=virtual,
            invocation=report.invocation or None,
            lasting=self._lasting if report.invocation else {},
        )
        self._sites.check(form)
        check_finite(form, self._model.dtype, admitted=self._weights)
        if not has_effect(form, self._sites):
            raise NoEffect(
                f"The {self._method} adapter changes nothing on this base: it would answer as the base does. Was it "
                "saved before it was trained?"
            )
        return form

    # Places.

    def _of(self, site: AdaptedSite) -> dict[str, Tensor]:
        return {suffix: self._tensors[key] for suffix, key in site.tensors.items()}

    def _find(self, name: str) -> str | None:
        """The path of a module in our base, whatever prefix the adapter's model class has; None: there is none."""
        if name == self._sites.head_name:
            return LM_HEAD
        known = (self._sites.linears, self._sites.norms, self._sites.tables)
        for path in (name.removeprefix(f"{self._prefix}."), name):
            if any(path in places for places in known):
                return path
        return None

    def _linear(self, name: str) -> str:
        return self._found(name, self._sites.linears, "a linear layer")

    def _norm(self, name: str) -> str:
        return self._found(name, self._sites.norms, "a normalization layer")

    def _table(self, name: str) -> str:
        return self._found(name, self._sites.tables, "the input embedding")

    def _found(self, name: str, places: Mapping[str, Any], kind: str) -> str:
        path = self._find(name)
        if path is None or path not in places:
            raise UnsupportedMethod(f"Module {name} is not {kind} of this base.", metadata={"module": name})
        return path

    def _put(self, path: str, form: LinearForm, name: str, *, lasting: bool = False) -> None:
        if path in self._layers or path in self._lasting:
            raise Rejected(f"The adapter names layer {name} twice.", reason="UNKNOWN_MODULE")
        (self._lasting if lasting else self._layers)[path] = form

    # Layers.

    def _formula_of_lora(self) -> bool:
        """Whether PEFT's layers compute W x + scaling · B A x with the base's own W, up to DoRA's scale."""
        config = self._report.config
        return not (
            self._report.initialisation
            or config.get("use_qalora")
            or any(m.diagonal_key or m.blocks_a or m.blocks_b for m in self._report.modules)
            or any(m.magnitude_key and (m.bias_key or m.kind == "embedding") for m in self._report.modules)
        )

    def _starts_from_base(self, module: AdaptedModule) -> bool:
        """Whether PEFT changes the base's weight under it."""
        return self._report.initialisation is not None or module.diagonal_key is not None

    def _take_lora(self) -> None:
        for module in self._report.modules:
            a, b = self._tensors[module.a_key], self._tensors[module.b_key]
            if module.kind == "embedding":
                self._take_lora_table(module)
                continue
            path = self._linear(module.name)
            if module.magnitude_key is None:
                b_bias = self._tensors[module.bias_key] if module.bias_key else None
                self._put(path, lora_form(a, b, module.scaling, b_bias=b_bias), module.name)
                continue
            layer = self._sites.linears[path]
            bias = None if layer.bias is None else layer.bias.detach().float()
            magnitude = self._tensors[module.magnitude_key]
            self._put(path, dora_form(a, b, module.scaling, magnitude, dense_weight(layer), bias), module.name)

    def _take_lora_table(self, module: AdaptedModule) -> None:
        if module.magnitude_key:
            raise UnsupportedMethod("DoRA on the embedding is not served: leave it out of target_modules.")
        self._refuse_table_apart(module.name)
        factors = embedding_factors(self._tensors[module.a_key], self._tensors[module.b_key], module.scaling)
        self._tables[self._table(module.name)] = TableForm(low_rank=factors)

    def _refuse_table_apart(self, name: str, field: str = "target_modules") -> None:
        """An encoder-decoder's stacks have tables of their own."""
        if self._model.seq2seq is None:
            return
        why = "of an encoder-decoder no table of rows is, neither its stacks' embeddings nor their biases of distances"
        if self._find(name) in self._sites.tables:
            why = "PEFT changes a table that no stack of an encoder-decoder calls, so it would have no effect"
        raise UnsupportedMethod(
            f"{self._method if field == 'target_modules' else field} on {name} is not served: {why}. Leave it out of "
            f"{field}.",
            metadata={"peft_type": self._method, "module": name},
        )

    def _read_layers(self) -> None:
        """Has PEFT itself build its layers over a view of the base, and reads them."""
        tensors = {key: self._tensors[key] for key in self._report.method_keys}
        for module in self._report.modules:
            if module.kind == "embedding":
                self._take_lora_table(module)
            elif self._starts_from_base(module) and self._find(module.name) == LM_HEAD and self._tied():
                raise UnsupportedMethod(
                    f"{self._report.initialisation or 'KaSA'} on {module.name} is not served: it changes the base's "
                    "head, and with it the embedding that shares its weight. Leave it out of target_modules.",
                    metadata={"peft_type": self._method, "module": module.name},
                )
        read = read_layers(self._root(tensors), self._report.config, tensors, self._model.dtype)
        for name, form in read.items():
            if isinstance(form, TableForm):
                self._refuse_table_apart(name)
                self._tables[self._table(name)] = form
            elif next(form.tensors(), None) is not None:
                self._put(self._linear(name), form, name)
        self._check_nothing_lost(read)

    def _check_nothing_lost(self, read: Iterable[str]) -> None:
        """Every module that admission found must have been read, be it to no effect there."""
        there = {self._find(name) for name in read} | self._tables.keys()
        lost = [site.name for site in self._report.sites if self._find(site.name) not in there]
        if lost:
            raise UnsupportedMethod(
                f"{self._method} on {lost[0]} is not served (of {len(lost)} such modules): leave it out of "
                "target_modules.",
                metadata={"peft_type": self._method, "module": lost[0]},
            )

    def _root(self, tensors: Mapping[str, Tensor]) -> Any:
        """The tree that the adapter's names fit. A head of its own stands beside the prefix."""
        base = self._model.base
        head = self._sites.head_name if base.model is not base.backbone else None
        inside = tuple(f"base_model.model.{name}." for name in (self._prefix, head) if name)
        of_layers = [key for key in tensors if key.startswith("base_model.model.")]
        task = self._report.config.get("task_type")
        prefixed = any(key.startswith(inside) for key in of_layers) if of_layers else task != "FEATURE_EXTRACTION"
        with_head = task in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
        pooler = self._model.pooler
        return peft_root(base.model, base.backbone, self._prefix, prefixed=prefixed, head=with_head, pooler=pooler)

    # Rows, whole modules, biases.

    def _take_tokens(self, trained: TrainedTokens) -> None:
        """Trained rows of the embedding, and of the head if it shares them; or of the head alone."""
        rows, on_head = self._tensors[trained.key], self._find(trained.name) == LM_HEAD
        if on_head:
            weight = dense_weight(self._sites.linears[LM_HEAD])
        else:
            weight = next(iter(self._sites.tables.values())).weight.detach()
        form = replaced_rows(trained.tokens, rows, weight.shape[0])
        if not on_head:
            table = self._table(trained.name)
            mine = self._tables.get(table)
            if mine is not None and mine.low_rank is not None:
                raise UnsupportedMethod("LoRA and trained tokens on one embedding are not served together.")
            self._tables[table] = form
        if on_head or self._tied():
            self._take_head_rows(form, weight, trained.name)

    def _take_head_rows(self, rows: TableForm, weight: Tensor, name: str) -> None:
        """Trained rows of the head, beside what else the adapter adds to it. PEFT saves tied rows once or twice."""
        if self._head_rows is not None:
            if not rows.equals(self._head_rows):
                raise Rejected(
                    f"The rows of {name} differ from those of the table that it is tied to.", reason="UNKNOWN_TENSOR"
                )
            return
        self._head_rows = rows
        change, mine = tied_head(rows, self._tied_weight(weight)), self._lasting.get(LM_HEAD)
        if mine is None:
            self._lasting[LM_HEAD] = LinearForm(low_rank=change)
        elif self._method == "LORA" and self._formula_of_lora() and mine.additive:
            self._lasting[LM_HEAD] = mine.with_low_rank(joined(mine.low_rank, change))
        else:
            raise UnsupportedMethod(
                "Trained tokens on a language-model head are served beside a plain LoRA on it, and beside nothing else "
                "(DoRA, PiSSA, …): leave it out of target_modules.",
                metadata={"peft_type": self._method, "module": name},
            )

    def _take_saved(self, site: AdaptedSite) -> None:
        """A module with parameters of its own: a norm, the embedding, a linear layer, or a bias alone."""
        path, own = self._find(site.name), self._of(site)
        if path in self._sites.norms:
            self._norms[path] = NormForm(own)
            return
        if site.kind == "embedding":
            self._refuse_table_apart(site.name, "modules_to_save")
        if path in self._sites.tables:
            table = self._sites.tables[path]
            check_shape(site.name, own["weight"], table.weight.shape)
            self._tables[path] = whole_table(own["weight"])
            if self._report.tying == "saved" and all(other.kind != "output" for other in self._report.saved):
                change = own["weight"].float() - self._tied_weight(table.weight).float()
                self._put(LM_HEAD, LinearForm(dense=change), site.name, lasting=True)
            return
        path = self._linear(site.name)
        layer = self._sites.linears[path]
        if "weight" in own:
            weight = dense_weight(layer)
            saved = own["weight"].t() if site.kind == "conv1d" else own["weight"]
            check_shape(site.name, saved, weight.shape)
            self._put(path, LinearForm(dense=saved.float() - weight), site.name, lasting=True)
        if "bias" in own:
            if layer.bias is None:
                raise Rejected(f"The base has no bias on {site.name}.", reason="UNKNOWN_TENSOR")
            base_bias = layer.bias.detach()  # PEFT gives a saved bias the base's dtype
            change = own["bias"].to(base_bias).float() - base_bias.float()
            self._lasting[path] = self._lasting.get(path, LinearForm()).plus_bias(change)

    def _tied(self) -> bool:
        return bool(getattr(self._model.base.model.config, "tie_word_embeddings", False)) and (
            LM_HEAD in self._sites.linears
        )

    def _tied_weight(self, shared: Tensor) -> Tensor:
        """What a head computes with that shares the weight `shared`: its own copy may have fewer bits."""
        head = self._sites.linears[LM_HEAD]
        return dense_weight(head) if isinstance(head.base_layer, QuantizedLinear) else shared.detach()

    def _check_copy(self, site: AdaptedSite) -> None:
        """PEFT saves the embedding and the head beside a LoRA on them; they must be the base's own, or what PiSSA and
        its like leave of it."""
        path = self._find(site.name)
        adapted = any(other.name == site.name for other in self._report.sites)
        if (
            path == LM_HEAD
            and not adapted
            and any(self._find(s.name) in self._sites.tables for s in self._report.saved)
        ):
            self._take_saved(site)  # PEFT loads it into the base's own head
            return
        if path in self._sites.tables:
            own = self._sites.tables[path].weight.detach()
        elif path == LM_HEAD and self._tied():
            own = next(iter(self._sites.tables.values())).weight.detach()
        else:
            own = dense_weight(self._sites.linears[self._linear(site.name)])
        changed = next((m for m in self._report.modules if m.name == site.name and self._starts_from_base(m)), None)
        if changed is not None and path in self._layers:
            own = changed_base(own, self._layers[path], changed, self._tensors)
        where = f"beside {self._method} on it" if adapted else "though it is not among modules_to_save"
        for copied in self._of(site).values():
            check_copy(site.name, copied, own, self._model.dtype, where, exact=changed is None)

    # The rest.

    def _virtual(self) -> Prompt | Prefix | None:
        apart, config = self._model.seq2seq is not None, self._report.config
        if apart and self._method in PROMPTS | PREFIXES:
            check_apart(self._method, config)
        if self._method in PROMPTS:
            return read_prompt(self._method, self._tensors, int(config["num_virtual_tokens"]) if apart else None)
        if self._method in PREFIXES:
            return read_prefix(self._method, self._tensors, self._model.attention_shapes, apart=apart)
        return None

    def _attention_prompt(self, name: str, parts: Mapping[str, Tensor]) -> tuple[int, AttentionPrompt]:
        path = name.removeprefix(f"{self._prefix}.")
        key, value, both = (self._sites.linears.get(f"{path}.{part}") for part in ("k_proj", "v_proj", "c_attn"))
        index = getattr(self._sites.backbone.get_submodule(path), "layer_idx", None)
        kind = self._model.base.files.config.get("model_type")
        prompt, gate = parts["adaption_prompt"], parts["adaption_gate"]
        if isinstance(index, int):
            size = self._model.attention_shapes[index].key_size
            if kind == "gpt2" and both is not None:
                return index, attention_prompt_behind(prompt, gate, both, size, path)
            if kind in ("llama", "mistral") and key is not None and value is not None:
                return index, attention_prompt(prompt, gate, key, value, size)
        raise UnsupportedMethod(
            "ADAPTION_PROMPT is served on Llama, Mistral and GPT-2 only, for which PEFT makes it.",
            metadata={"peft_type": self._method},
        )
