"""The network a scan reads: a Hugging Face folder or hub id, or ``module:callable``.

Nothing that is read runs code of the checkpoint's: no remote code, no pickles, weights from
safetensors only. Only ``module:callable`` runs code, the one that is named.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets.sharded import full, is_sharded
from deaddir_fast.scan import checkpoint, reference
from deaddir_fast.scan.checkpoint import Checkpoint
from deaddir_fast.scan.encoders import HiddenStates, SentenceEmbedding
from deaddir_fast.scan.masks import keep_masks_in_traces


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to be read.

    Attributes:
        model: in eval mode, no parameter requires a gradient. It returns a tensor or an output with
            ``logits``; encoders without a head are wrapped (see ``encoders``).
        source: what was asked for.
        tokenizer: of transformers, or None.
        likelihood: the one its outputs ask for: "categorical" with a language or classification
            head ("bernoulli" for several labels at once, "gaussian" for regression), "gaussian" for
            encoders. Of a module of one's own it is not known; "categorical", the default
            everywhere, is assumed and ``notes`` says so.
        vocabulary: ids it embeds are below this; None if it takes no ids or it is not known.
        maximum_length: most tokens of a sample it or its tokenizer are made for, or None.
        pad_id: the id for padding, or None.
        takes_mask: whether its forward takes ``attention_mask``.
        fingerprint: see :func:`fingerprint`.
        notes: what was left out, assumed or chosen on the way.
    """

    model: nn.Module = field(repr=False)
    source: str
    tokenizer: Any = field(repr=False)
    likelihood: str
    vocabulary: int | None
    maximum_length: int | None
    pad_id: int | None
    takes_mask: bool
    fingerprint: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a network before its weights are read; None where it is not.

    Attributes:
        source: what was asked for.
        architecture: class of the network.
        likelihood: as in :class:`LoadedModel`.
        shapes: shape and dtype ("F32", "BF16", …) of every tensor: by its name in the files for a
            checkpoint, of the parameters for a module of one's own.
        parameters: entries of all floating tensors (those of the files may include buffers).
        bytes_on_disk: size of the weight files.
        vocabulary, maximum_length: as the config has them.
        unknown: what could not be known, and why.
    """

    source: str
    architecture: str | None
    likelihood: str
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(repr=False)
    parameters: int | None
    bytes_on_disk: int | None
    vocabulary: int | None
    maximum_length: int | None
    unknown: tuple[str, ...]


_ASSUMED = "likelihood: not known for a module of one's own; categorical is assumed"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


# ------------------------------------------------------------------------------------- fingerprint


def _contents(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers that a checkpoint would hold; shared ones once."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    for name, value in model.named_buffers():
        if name in kept:
            yield name, value


def _digest(named: tuple[str, Tensor]) -> bytes:
    name, value = named
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    label = f"{name}\0{tuple(value.shape)}\0{value.dtype}\0"
    key = hashlib.sha256(label.encode()).digest()
    return hashlib.blake2b(raw, digest_size=32, key=key).digest()


def fingerprint(model: nn.Module) -> str:
    """32 hex digits over names, shapes, dtypes and every byte of parameters and saved buffers.

    BLAKE2b of each tensor, keyed by its name, shape and dtype, on all cores (about 1 GB/s each),
    then BLAKE2b of those in order. Nothing is sampled: one changed bit changes it.
    """
    whole = hashlib.blake2b(digest_size=16)
    if is_sharded(model):
        # Gathering is collective: one after another, in order. The same digits as unsharded.
        for name, value in _contents(model):
            whole.update(_digest((name, full(value))))
        return whole.hexdigest()
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashlib releases the GIL
        for digest in threads.map(_digest, _contents(model)):
            whole.update(digest)
    return whole.hexdigest()


# ---------------------------------------------------------------------------------------- folders


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"MODEL: reading a Hugging Face model needs transformers: {checkpoint.INSTALL} "
            f"({error})"
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and reports of loading: what matters in them becomes an error or a note."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _pretrained(found: Checkpoint, dtype: torch.dtype | None) -> tuple[nn.Module, list[str]]:
    """The model of the architecture that config.json names, on the CPU."""
    transformers = _transformers()
    keep_masks_in_traces()
    notes: list[str] = []
    loader, _ = checkpoint.head(found.config)
    config = transformers.AutoConfig.from_pretrained(
        found.folder, local_files_only=True, trust_remote_code=False
    )
    config.use_cache = False  # a cache is an output nobody reads
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {
        "config": config,
        "attn_implementation": "sdpa",
        "local_files_only": True,
        "output_loading_info": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "dtype" if version >= (4, 56) else "torch_dtype": "auto" if dtype is None else dtype,
    }
    if loader == "AutoModel":
        kind = transformers.MODEL_MAPPING.get(type(config), None)
        if kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
            options["add_pooling_layer"] = False  # it is behind the hidden states
    auto = getattr(transformers, loader)
    with _quiet(transformers):
        try:
            model, info = auto.from_pretrained(found.folder, **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            options["attn_implementation"] = "eager"
            model, info = auto.from_pretrained(found.folder, **options)
            notes.append("attention: eager, the architecture has no fused form")
    absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if absent:
        raise ValueError(
            f"MODEL: the files in {found.folder} lack weights of {type(model).__name__}, which "
            f"would be random: {', '.join(absent[:5])}{', …' if len(absent) > 5 else ''}"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        notes.append(
            f"left out, not part of the outputs read: {', '.join(unused[:5])}"
            + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        )
    named = (found.config.get("architectures") or [None])[0]
    if named not in (None, type(model).__name__):
        notes.append(f"read as {type(model).__name__}, config.json says {named}")
    if dtype == torch.float64 and experts_in_fp64(model):
        notes.append("experts: batched products, grouped ones do not exist in fp64")
    return model, notes


def experts_in_fp64(model: nn.Module) -> bool:
    """Let experts of Hugging Face models multiply in fp64; whether anything was changed."""
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) != "grouped_mm":
        return False
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return True


def _tokenizer(found: Checkpoint, notes: list[str]) -> Any:
    """The folder's tokenizer, or None; a broken one only matters if there is text to read."""
    if found.tokenizer is None:
        return None
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            found.tokenizer, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        notes.append(f"tokenizer: could not be read ({error})")
        return None
    if found.sentence is not None and found.sentence.lower_case:
        from tokenizers import normalizers

        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), *filter(None, [backend.normalizer])]
        backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _embedded(model: nn.Module) -> int | None:
    """Rows of the table of token embeddings."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _length(model: nn.Module, config: Any, *others: Any) -> int | None:
    """The smallest limit on the number of tokens; a tokenizer without one says about 1e30."""
    own = next((v for k in _LENGTHS if isinstance(v := getattr(config, k, None), int)), None)
    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if table and module.padding_idx is not None:  # RoBERTa's positions start behind it
            own = module.num_embeddings - module.padding_idx - 1
    limits = [x for x in (own, *others) if isinstance(x, int) and 0 < x < 10**9]
    return min(limits, default=None)


def _takes_mask(model: nn.Module) -> bool:
    known = inspect.signature(model.forward).parameters
    return "attention_mask" in known or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()
    )


def _finish(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Eval mode, no gradients, and the dtype asked for."""
    model = model.eval().requires_grad_(False)
    return model if dtype is None else model.to(dtype)


def _own_module(source: str, dtype: torch.dtype | None) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _finish(reference.build("MODEL", source), dtype)
    likelihood, notes = "categorical", [_ASSUMED]
    config = getattr(model, "config", None)
    hf = sys.modules.get("transformers")
    if hf is not None and isinstance(model, hf.PreTrainedModel):
        described = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        loader, likelihood = checkpoint.head(described)
        notes = []
        if loader in ("AutoModel", "AutoModelForTextEncoding"):
            model = HiddenStates(model).eval()
    inner = model.transformer if isinstance(model, HiddenStates) else model
    return {
        "model": model,
        "tokenizer": None,
        "likelihood": likelihood,
        "vocabulary": _embedded(inner),
        "maximum_length": _length(inner, config),
        "pad_id": getattr(config, "pad_token_id", None),
        "notes": notes,
    }


def _from_folder(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    found = checkpoint.open_folder(folder)
    inner, notes = _pretrained(found, dtype)
    inner = _finish(inner, dtype)
    tokenizer = _tokenizer(found, notes)
    loader, likelihood = checkpoint.head(found.config)
    sentence = found.sentence
    model = inner
    if sentence is not None:
        model = SentenceEmbedding(inner, sentence.poolings, sentence.normalize).eval()
    elif loader in ("AutoModel", "AutoModelForTextEncoding"):
        model = HiddenStates(inner).eval()
    config = inner.config
    pad = getattr(tokenizer, "pad_token_id", None)
    length = _length(
        inner,
        config,
        getattr(tokenizer, "model_max_length", None),
        sentence.maximum_length if sentence is not None else None,
    )
    return {
        "model": model,
        "tokenizer": tokenizer,
        "likelihood": likelihood if sentence is None else "gaussian",
        "vocabulary": _embedded(inner),
        "maximum_length": length,
        "pad_id": getattr(config, "pad_token_id", None) if pad is None else pad,
        "notes": notes,
    }


def load_model(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    allow_download: bool = True,
) -> LoadedModel:
    """The network named on the command line.

    Args:
        source: a Hugging Face folder or hub id (also of sentence-transformers), or
            ``module:callable`` or ``path/to/file.py:callable`` for a function without arguments
            that returns an ``nn.Module``. It is called under ``torch.manual_seed(0)``, so that
            random weights are the same every time; the caller's random state is kept.
        dtype: float64, float32, bfloat16 or float16; as stored by default.
        device: where to put it.
        allow_download: whether a hub id that is not in the local cache may be fetched.

    Raises:
        ModuleNotFoundError: if transformers is needed and not installed.
        FileNotFoundError: if there is no such folder, or the hub cannot be reached.
        ImportError, AttributeError, TypeError: if there is no such callable or it returns another
            thing.
        ValueError: for weights that are not safetensors, that are quantised, or that the
            architecture needs and the files lack; for encoder-decoders.
    """
    if dtype is not None and dtype not in _check.FLOATING:
        raise _check.fail("dtype", dtype, "float64, float32, bfloat16, float16 or None")
    if reference.is_reference(source):
        found = _own_module(source, dtype)
    else:
        folder = checkpoint.locate(source, allow_download=allow_download)
        found = _from_folder(folder, dtype)
    model = found["model"]
    if next(model.parameters(), None) is None:
        raise ValueError(f"MODEL: {source} has no parameters")
    identity = fingerprint(model)
    found.update(model=model.to(device), notes=tuple(found["notes"]))
    return LoadedModel(source=source, takes_mask=_takes_mask(model), fingerprint=identity, **found)


# ---------------------------------------------------------------------------------------- dry run


def _plan_own(source: str) -> ModelPlan:
    """Build on the meta device: shapes without memory."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    architecture = parameters = vocabulary = None
    unknown = ["likelihood: not known for a module of one's own", "bytes on disk: it has no file"]
    try:
        with torch.device("meta"):
            model = reference.build("MODEL", source)
    except (RuntimeError, NotImplementedError) as error:
        unknown.append(f"shapes and parameters: {source} cannot be built without memory ({error})")
    else:
        architecture, vocabulary = type(model).__name__, _embedded(model)
        for name, value in model.named_parameters():
            shapes[name] = tuple(value.shape), _DTYPES.get(value.dtype, str(value.dtype))
        parameters = sum(prod(shape) for shape, _ in shapes.values())
    return ModelPlan(
        source,
        architecture,
        "categorical",
        shapes,
        parameters,
        None,
        vocabulary,
        None,
        tuple(unknown),
    )


def plan_model(source: str, *, allow_download: bool = True) -> ModelPlan:
    """What can be known of a network from its config and the headers of its files.

    No weights are read and transformers is not needed for a folder. Of a hub id that is not in the
    cache only config.json and the headers are fetched. ``module:callable`` is called on the meta
    device; what it builds elsewhere all the same is built.

    Raises:
        As :func:`load_model`.
    """
    if reference.is_reference(source):
        return _plan_own(source)
    unknown: list[str] = []
    sentence, size = None, None
    folder = None
    try:
        folder = checkpoint.locate(source, allow_download=False)
    except FileNotFoundError:
        if not allow_download or not checkpoint.is_hub_id(source):
            raise
    if folder is None:
        config, shapes = checkpoint.remote_headers(source)
        unknown.append("bytes on disk, pooling: not in the local cache")
    else:
        found = checkpoint.open_folder(folder)
        config, sentence = found.config, found.sentence
        shapes = checkpoint.headers(found.files)
        size = sum(path.stat().st_size for path in found.files)
    _, likelihood = checkpoint.head(config)
    names = config.get("architectures")
    if not names:
        unknown.append("architecture: config.json does not say; read as an encoder without a head")
    lengths = [config[k] for k in _LENGTHS if isinstance(config.get(k), int)][:1]
    if sentence is not None and sentence.maximum_length:
        lengths.append(sentence.maximum_length)
    return ModelPlan(
        source,
        names[0] if names else None,
        "gaussian" if sentence is not None else likelihood,
        shapes,
        checkpoint.parameters(shapes),
        size,
        config.get("vocab_size"),
        min(lengths, default=None),
        tuple(unknown),
    )
