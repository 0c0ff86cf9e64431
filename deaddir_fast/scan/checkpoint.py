"""Hugging Face folders: where they lie, what they hold, and what is refused. Reads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from deaddir_fast.scan.encoders import POOLINGS

INSTALL = "pip install 'deaddir_fast[hf]'"
INDEX = "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# How the name of an architecture ends -> the class of transformers that loads it, the likelihood.
_HEADS = (
    (("ForCausalLM", "LMHeadModel", "ModelWithLMHead"), "AutoModelForCausalLM", "categorical"),
    (("ForMaskedLM",), "AutoModelForMaskedLM", "categorical"),
    (("ForSequenceClassification",), "AutoModelForSequenceClassification", "categorical"),
    (("ForTokenClassification",), "AutoModelForTokenClassification", "categorical"),
    (("ForImageClassification",), "AutoModelForImageClassification", "categorical"),
    (("T5EncoderModel",), "AutoModelForTextEncoding", "gaussian"),
)


@dataclass(frozen=True)
class Sentence:
    """What ``modules.json`` of a sentence-transformers folder says.

    Attributes:
        poolings: see ``encoders.POOLINGS``.
        normalize: whether embeddings are scaled to norm 1.
        maximum_length: tokens of a sentence, or None.
        lower_case: whether text is put in lower case before the tokenizer.
    """

    poolings: tuple[str, ...]
    normalize: bool
    maximum_length: int | None
    lower_case: bool


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded.

    Attributes:
        folder: where config.json and the weights lie.
        config: what config.json says.
        files: the safetensors files.
        sentence: what a sentence-transformers folder adds, or None.
        tokenizer: the folder of the tokenizer's files, or None.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    sentence: Sentence | None
    tokenizer: Path | None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: naming the file, if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL: {path} is not JSON ({error})") from None


def head(config: dict[str, Any]) -> tuple[str, str]:
    """Class of transformers that loads an architecture, and the likelihood its outputs ask for.

    Raises:
        ValueError: for encoder-decoders, whose forward pass needs a target text.
    """
    names = config.get("architectures") or [""]
    loader, likelihood = "AutoModel", "gaussian"
    for endings, auto, suggested in _HEADS:
        if names[0].endswith(endings):
            loader, likelihood = auto, suggested
            break
    if config.get("is_encoder_decoder") and loader != "AutoModelForTextEncoding":
        raise ValueError(
            f"MODEL: expected an encoder or a decoder, got {names[0] or 'an encoder-decoder'}, "
            "which needs a target text for every input"
        )
    if loader == "AutoModelForSequenceClassification":
        problem = config.get("problem_type")
        labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        if problem == "regression" or (problem is None and labels == 1):
            likelihood = "gaussian"
        elif problem == "multi_label_classification":
            likelihood = "bernoulli"
    return loader, likelihood


def is_hub_id(source: str) -> bool:
    """Whether ``source`` could be ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(source) is not None


def refuse_pickles(source: str, names: Iterable[str]) -> NoReturn:
    """Say why a place without safetensors cannot be read.

    Raises:
        ValueError: always, naming the files with pickled weights that are there.
    """
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    found = f"only {', '.join(pickled)}" if pickled else "none"
    raise ValueError(
        f"MODEL: expected weights in safetensors (model.safetensors or {INDEX}) in {source}, "
        f"found {found}; other formats can run code when they are read. Save the model again "
        "with save_pretrained(..., safe_serialization=True)"
    )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the model in ``folder``.

    Raises:
        ValueError: if there are none.
        FileNotFoundError: if one named in the index is missing.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    if not (folder / INDEX).is_file():
        refuse_pickles(str(folder), (p.name for p in folder.iterdir()))
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"MODEL: {folder / INDEX} names files that are missing: {missing}")
    return tuple(folder / name for name in names)


def _poolings(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    if "pooling_mode" in config:
        given = config["pooling_mode"]
        chosen = tuple([given] if isinstance(given, str) else given)
    else:
        long = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
        long["mean_sqrt_len"] = "mean_sqrt_len_tokens"
        chosen = tuple(p for p in POOLINGS if config.get(f"pooling_mode_{long.get(p, p)}"))
    if not chosen or not set(chosen) <= set(POOLINGS):
        raise ValueError(f"MODEL: expected poolings among {POOLINGS} in {path}, got {chosen}")
    return chosen


def _sentence(folder: Path) -> tuple[Path, Sentence]:
    """Folder of the transformer, and what follows it."""
    modules = read_json(folder / "modules.json")
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"MODEL: expected modules Transformer, Pooling and maybe Normalize in "
            f"{folder / 'modules.json'}, got {kinds}"
        )
    pooling = folder / modules[1]["path"] / "config.json"
    if not pooling.is_file():
        raise FileNotFoundError(f"MODEL: {pooling} is missing; it says how sentences are pooled")
    inner = folder / modules[0]["path"]
    settings: dict[str, Any] = {}
    for place in (inner, folder):
        if (place / "sentence_bert_config.json").is_file():
            settings = read_json(place / "sentence_bert_config.json")
            break
    return inner, Sentence(
        _poolings(read_json(pooling), pooling),
        len(kinds) == 3,
        settings.get("max_seq_length"),
        bool(settings.get("do_lower_case")),
    )


def open_folder(folder: Path) -> Checkpoint:
    """Look into a folder without reading weights.

    Raises:
        FileNotFoundError: if config.json or a file named in an index is missing.
        ValueError: for weights that are not safetensors, quantised weights, encoder-decoders, and
            sentence-transformers modules other than Transformer, Pooling and Normalize.
    """
    inner, sentence = folder, None
    if (folder / "modules.json").is_file():
        inner, sentence = _sentence(folder)
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"MODEL: expected config.json in {inner}, found none")
    config = read_json(inner / "config.json")
    if "quantization_config" in config:
        raise ValueError(
            f"MODEL: the weights in {inner} are quantised; expected floating-point weights"
        )
    head(config)
    files = weight_files(inner)
    places = [p for p in (inner, folder) if any((p / name).is_file() for name in TOKENIZERS)]
    return Checkpoint(inner, config, files, sentence, places[0] if places else None)


def locate(source: str, *, allow_download: bool) -> Path:
    """The folder of a model: itself, or a hub id's folder in the local cache.

    Raises:
        FileNotFoundError: if there is neither.
        ModuleNotFoundError: for a hub id without transformers installed.
        ValueError: for a file, a name that is none, and a hub repository without safetensors.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"MODEL: expected a folder with config.json, a hub id or module:callable, got the "
            f"file {source}"
        )
    if not is_hub_id(source):
        raise FileNotFoundError(f"MODEL: no folder {source}")
    hub = _hub(source)
    cached = _cached(hub, source)
    if cached is not None:
        return cached
    if not allow_download:
        raise FileNotFoundError(
            f"MODEL: {source} is neither a folder nor in the local cache, and downloads are off"
        )
    names = _fetch(source, hub.list_repo_files)
    if not any(name.endswith(".safetensors") for name in names):
        refuse_pickles(source, names)
    return Path(
        _fetch(source, hub.snapshot_download, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    )


def _fetch(source: str, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the hub answers; the errors of its transport have no common base over versions."""
    try:
        return ask(source, *args, **kwargs)
    except Exception as error:
        if isinstance(error, _hub(source).errors.NotASafetensorsRepoError):
            raise
        raise FileNotFoundError(
            f"MODEL: {source} is neither a folder nor in the local cache, and cannot be fetched "
            f"({error})"
        ) from None


def _hub(source: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"MODEL: no folder {source}; for a model of that name on the hub {INSTALL}"
        ) from None
    return huggingface_hub


def _cached(hub: Any, source: str) -> Path | None:
    """A complete copy in the cache; a config alone may be left from a look at it."""
    try:
        found = hub.snapshot_download(
            source, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    folder = Path(found)
    if not any(folder.rglob("*.safetensors")):
        return None
    try:
        open_folder(folder)
    except FileNotFoundError:
        return None
    return folder


def headers(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype (as safetensors writes it: "F32", "BF16", …) of every tensor in the files.

    Raises:
        ValueError: naming a file that is not safetensors.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"MODEL: {path} is not a safetensors file ({error})") from None
    return found


def remote_headers(source: str) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
    """config.json and the headers of a hub repository, without its weights.

    Raises:
        FileNotFoundError: if it cannot be reached.
        ValueError: if it has no safetensors.
    """
    hub = _hub(source)
    try:
        found = _fetch(source, hub.get_safetensors_metadata)
    except hub.errors.NotASafetensorsRepoError:
        refuse_pickles(source, _fetch(source, hub.list_repo_files))
    config = read_json(Path(_fetch(source, hub.hf_hub_download, "config.json")))
    shapes = {
        name: (tuple(info.shape), str(info.dtype))
        for part in found.files_metadata.values()
        for name, info in part.tensors.items()
    }
    return config, shapes


def parameters(shapes: dict[str, tuple[tuple[int, ...], str]]) -> int:
    """Entries of all floating tensors."""
    return sum(prod(shape) for shape, dtype in shapes.values() if dtype.startswith(("F", "BF")))
