"""An export with its models: from token ids to features, scores and keep masks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention import LOG_LIMIT, MEAN_FLOOR, _chunk_scores, _Layer, key_diff_of, log_odds
from .budgets import HeadBudgets
from .export import export_folder, read_config
from .keep import keep_mask
from .mapper import HybridAxialMapper, read_tensors
from .reading import CHANNELS, PREFILL_CHANNELS, REPEAT_CHANNELS, UNRUN_CHANNELS, Reading, _check_type, _tap
from .tokens import Requests, vocab_hash

if TYPE_CHECKING:
    from transformers import Cache


def source_sections(extract: dict) -> dict[str, dict]:
    """The models that features come from, in the mapper's order, each with what it is asked for in `channels`."""
    channels = {"proxy": extract["channels"], "target": extract.get("target_channels", list(PREFILL_CHANNELS))}
    known = {"proxy": (*CHANNELS, *REPEAT_CHANNELS), "target": (*CHANNELS, "hidden_linear")}
    sources = extract.get("from", ["proxy"])
    unknown = [f"{s} {c}" for s in sources for c in channels.get(s, "?") if c not in known.get(s, ())]
    if unknown:
        raise ValueError(f"features `{', '.join(unknown)}` are not known here: this file is older than the export")
    return {source: {**extract, "channels": channels[source]} for source in sources}


def join_features(parts: list[tuple[torch.Tensor, torch.Tensor]], sections: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of several sources as the mapper reads them: f32 `[p, channels, t]` and `[globals, t]`.

    Each part has the heads, channels and globals of its source, each section its names of them. Heads of the sources follow
    one another. Channels are the union of their lists in the order of first mention, 0 where a source lacks one. Globals are
    all of the first source and, of the others, the surprisal.
    """
    if len(parts) == 1:
        return parts[0]
    channels = list(dict.fromkeys(channel for section in sections for channel in section["channels"]))
    heads, globals_, device = [], [], parts[0][0].device
    for i, ((heads_pct, globals_ct), section) in enumerate(zip(parts, sections)):
        all_pct = torch.zeros(heads_pct.shape[0], len(channels), heads_pct.shape[2], device=device)
        all_pct[:, [channels.index(channel) for channel in section["channels"]]] = heads_pct.to(device)
        rows = [row for row, name in enumerate(section["globals"]) if i == 0 or name == "surprisal"]
        heads.append(all_pct)
        globals_.append(globals_ct.to(device)[rows])
    return torch.cat(heads), torch.cat(globals_)


class ProxyKV:
    """An export, with its proxy if it reads one: from token ids to features, scores and keep masks of KV pairs.

    `sources` are the models that the mapper reads, `proxy` and `target` in its order, each with what it is asked for.
    """

    def __init__(
        self,
        config: dict,
        mapper: HybridAxialMapper,
        proxy: nn.Module | None = None,
        tokenizer=None,
        hidden: tuple[torch.Tensor, torch.Tensor] | None = None,
        budgets: HeadBudgets | None = None,
    ):
        """`hidden`: weight `[l, d, h]` and bias `[l, h]` that the channel `hidden_linear` of the target needs.

        `budgets` are needed by the policy `pair-budget`.
        """
        self.config, self.mapper, self.proxy, self.tokenizer, self.hidden = config, mapper, proxy, tokenizer, hidden
        self.budgets = budgets
        self._tokenizers = {}
        self.sources = source_sections(config["extract"])
        if ("proxy" in self.sources) != (proxy is not None):
            raise ValueError(f"the mapper reads features of {', '.join(self.sources)}; a proxy was {'' if proxy else 'not '}given")
        if "target" in self.sources and "hidden_linear" in self.sources["target"]["channels"]:
            shape = config["target"]["shape"]
            l, d, h = shape["layers"], shape["hidden"], shape["kv_heads"]
            found = [tuple(x.shape) for x in hidden or ()]
            if found != [(l, d, h), (l, h)]:
                raise ValueError(f"the export's map of hidden states has shapes {found}, expected {[(l, d, h), (l, h)]}")
        if proxy is not None:
            self._check_proxy()

    def _check_proxy(self):
        named, model = self.config["proxy"], self.proxy.eval()
        self.mapper.to(model.device)
        shape, found = named["shape"], model.config
        expected = (shape["layers"], shape["kv_heads"], shape["query_heads"], shape["vocab"])
        found = (found.num_hidden_layers, found.num_key_value_heads, found.num_attention_heads, found.vocab_size)
        if expected != found:
            raise ValueError(
                f"the proxy has layers, KV heads, query heads, vocabulary {found}, the export's `{named['model']}` has {expected}"
            )
        _check_type(model)
        if vocab_hash(self.tokenizer) != named["vocab_hash"]:
            raise ValueError(f"the proxy's vocabulary is not that of `{named['model']}`, which the mapper knows")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        proxy: str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> ProxyKV:
        """Load an export (folder or hub name), and its proxy if it is a source of features.

        `proxy` replaces the name or folder that the export has for it, `dtype` the one it was run in; `device` is where
        proxy and mapper run. Without a proxy, `self.proxy` and `self.tokenizer` are None.
        """
        folder = export_folder(source, revision)
        config = read_config(folder)
        mapper = HybridAxialMapper.from_export(folder, verify=False).to(device or "cpu")
        tensors = read_tensors(folder / "model.safetensors")
        hidden = tuple(tensors[name] for name in ("hidden.weight_lmh", "hidden.bias_lh") if name in tensors)
        budgets = HeadBudgets.read(folder)
        if "proxy" not in source_sections(config["extract"]):
            if proxy is not None:
                raise ValueError(f"the mapper reads the target alone; leave the proxy `{proxy}` out")
            return cls(config, mapper, hidden=hidden or None, budgets=budgets)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if "proxy" not in config:
            raise ValueError(f"the mapper of `{folder}` reads features of a proxy, and the export names none")
        named = config["proxy"]
        pinned = {}
        if proxy is None:
            proxy = named["model"]
            if named["revision"].startswith("local:"):
                if not Path(proxy).is_dir():
                    raise FileNotFoundError(
                        f"the export's proxy is the local folder `{proxy}`, which is not here; "
                        "give its place: `proxy=\"path/to/proxy\"`"
                    )
            else:
                pinned["revision"] = named["revision"]
        dtype = dtype or {"Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16}[named["dtype"]]
        tokenizer = AutoTokenizer.from_pretrained(proxy, trust_remote_code=False, **pinned)
        model = AutoModelForCausalLM.from_pretrained(
            proxy, dtype=dtype, trust_remote_code=False, use_safetensors=True, **pinned
        )
        return cls(config, mapper, model.to(device or "cpu"), tokenizer, hidden or None, budgets)

    @contextmanager
    def tap(self, target: nn.Module, prefix: int, context: int | None = None):
        """Gather the target's features while it prefills, for `target=` of the other methods: no second forward.

            with px.tap(target, prefix) as reading:
                target.model(input_ids=ids, past_key_values=cache)
            keep = px.keep(ids, prefix, 0.1, target=reading)

        The channels `replay_unrun` and `replay_unrun_mean` need the context in one forward, or its length `context`,
        which the prefix is no part of.
        """
        with self._reading_of(target, prefix, context).gathering() as reading:
            yield reading

    def _reading_of(self, target: nn.Module, prefix: int, context: int | None = None) -> Reading:
        if "target" not in self.sources:
            raise ValueError("the mapper reads the proxy alone")
        self.check_target(target)
        section = self.sources["target"]
        return Reading(target, section, prefix, self.hidden, self._requests(section, lambda: self.tokenizer_of(target)), context)

    def _requests(self, section: dict, tokenizer) -> Requests | None:
        """Where the channels of a source need them; `tokenizer` gives its tokenizer."""
        moves = any(channel in UNRUN_CHANNELS for channel in section["channels"])
        return Requests.of(tokenizer(), self.config["label"]) if moves else None

    def tokenizer_of(self, target: nn.Module):
        """The tokenizer beside the target's weights; its vocabulary must be the one that the mapper knows."""
        name = target.config.name_or_path
        if name not in self._tokenizers:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if vocab_hash(tokenizer) != self.config["target"]["vocab_hash"]:
                raise ValueError(f"the vocabulary of `{name}` is not that of the target that the mapper knows")
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    @torch.no_grad()
    def features(
        self, ids: list[int] | torch.Tensor, prefix: int, target: nn.Module | Reading | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw features of the tokens after the first `prefix`: f32 `[p, channels, t]` and `[globals, t]`.

        `target` is needed where it is a source: what `tap` gathered, or the model, which then prefills here.
        """
        parts = [self._features_of(source, ids, prefix, target) for source in self.sources]
        return join_features(parts, list(self.sources.values()))

    def _features_of(self, source: str, ids, prefix: int, target):
        if source == "proxy":
            section = self.sources["proxy"]
            reading = Reading(self.proxy, section, prefix, requests=self._requests(section, lambda: self.tokenizer))
            cache = reading.prefill(ids)
            heads_pct, globals_ct = reading.features()
            if any(channel in REPEAT_CHANNELS for channel in reading.extract["channels"]):
                self._reconstruction(reading.ids, prefix, cache, heads_pct)
            return heads_pct, globals_ct
        if target is None:
            raise ValueError("the mapper reads features of the target: give the model, or what `tap` gathered, as `target=`")
        if not isinstance(target, Reading):
            reading = self._reading_of(target, prefix)
            reading.prefill(ids)
            return reading.features()
        if target.prefix != prefix or target.ids.tolist() != torch.as_tensor(ids).reshape(-1).tolist():
            raise ValueError("the target read other tokens, or another prefix, than these")
        return target.features()

    def _reconstruction(self, ids, prefix: int, cache, heads_pct):
        """Channels for which the proxy repeats its context, chunk by chunk, as KVzip scores do."""
        model, label, channels = self.proxy, self.config["label"], self.sources["proxy"]["channels"]
        original = label["preset"] == "original"
        scorer = label.get("scorer") or ("kvzip-plus" if label["preset"] == "plus" else "plain")
        if scorer not in ("plain", "kvzip-plus"):
            raise ValueError(f"the scorer `{scorer}` of the labels is not computed here")
        requests = Requests.of(self.tokenizer, label)
        sink = label["sink"] or ("prefix" if original else {"tokens": 4})
        sink = prefix if sink == "prefix" else min(sink["tokens"], prefix)
        context = ids[prefix:].tolist()
        shape = (heads_pct.shape[0], len(context))
        max_pt, mean_pt = (torch.zeros(shape, device=heads_pct.device) for _ in range(2))
        held, heads = cache.get_seq_length(), model.config.num_key_value_heads
        for start, end in requests.chunks(len(context)):

            def see(layer: _Layer, start=start, end=end):
                best_ht, mean_ht = _chunk_scores(layer, sink, prefix + start, prefix + end, scorer == "kvzip-plus")
                rows = slice(layer.index * heads, (layer.index + 1) * heads)
                max_pt[rows, start:end], mean_pt[rows, start:end] = best_ht, mean_ht

            with _tap(model, see):
                input_ids = torch.tensor([requests.ids(context, start, end)], device=model.device)
                model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
            cache.crop(held)
        of = {
            "recon_log": lambda: max_pt.log().clamp(-LOG_LIMIT, 0.0),
            "recon_log_odds": lambda: log_odds(max_pt),
            "recon_mean": lambda: (mean_pt + MEAN_FLOOR).log(),
        }
        for slot, channel in enumerate(channels):
            if channel in of:
                heads_pct[:, slot] = of[channel]().clamp(-LOG_LIMIT, LOG_LIMIT)

    @torch.no_grad()
    def scores(
        self, ids: list[int] | torch.Tensor, prefix: int, target: nn.Module | Reading | None = None
    ) -> torch.Tensor:
        """The mapper's scores of the target's KV pairs after the prefix, f32 `[layers, KV heads, t]`."""
        shape, device = self.config["target"]["shape"], self.mapper.standardize.heads_mean.device
        scores_ot = self.mapper.scores(*(x.to(device) for x in self.features(ids, prefix, target)))
        return scores_ot.reshape(shape["layers"], shape["kv_heads"], -1)

    def keep(
        self,
        ids: list[int] | torch.Tensor,
        prefix: int,
        retention: float,
        policy: str = "pair-floor",
        target: nn.Module | Reading | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Which of the target's KV pairs stay, bool `[layers, KV heads, prefix + t]`; the prefix always does.

        `cache` is the target's, with nothing but `ids` in it; only `pair-keydiff` reads it.
        """
        keys = key_diff_of(cache, prefix) if policy == "pair-keydiff" and cache is not None else None
        keep_lht = keep_mask(self.scores(ids, prefix, target), policy, retention, self.budgets, keys)
        return torch.cat([torch.ones(*keep_lht.shape[:2], prefix, dtype=torch.bool, device=keep_lht.device), keep_lht], -1)

    def check_target(self, model: nn.Module) -> None:
        """Refuse a model that is not shaped as the target whose scores the mapper knows."""
        named = self.config["target"]
        shape, found = named["shape"], model.config
        expected = {
            "num_hidden_layers": shape["layers"],
            "num_key_value_heads": shape["kv_heads"],
            "num_attention_heads": shape["query_heads"],
            "hidden_size": shape["hidden"],
            "vocab_size": shape["vocab"],
        }
        found = {name: getattr(found, name, None) for name in expected}
        if found != expected:
            raise ValueError(f"the mapper was trained for `{named['model']}` with {expected}; this model has {found}")
        if "target" in self.sources:
            _check_type(model)
