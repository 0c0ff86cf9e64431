"""Networks named on the command line: modules of one's own, Hugging Face folders, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import minilm

import deaddir_fast as dd
from deaddir_fast.nets.graph import model_output
from deaddir_fast.scan import encoders
from deaddir_fast.scan.load_data import load_data
from deaddir_fast.scan.load_model import fingerprint, load_model, plan_model

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 2)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)

def stubborn():
    net = nn.Linear(2, 2)
    if bool(net.weight.isnan().any()):
        raise ValueError
    return net

def vast():
    return nn.Linear(10**6, 10**6, bias=False)

def bare():
    return nn.ReLU()

number = 3

def wrong():
    return number
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "own_networks.py"
    sys.modules.pop("own_networks", None)


# ---------------------------------------------------------------------------- modules of one's own


def test_module_and_file(module):
    state = torch.get_rng_state()
    by_name = load_model("own_networks:build")
    by_file = load_model(f"{module}:build")
    assert torch.equal(torch.get_rng_state(), state)
    assert by_name.fingerprint == by_file.fingerprint  # the same random weights every time
    assert not any(m.training for m in by_name.model.modules())
    assert not any(p.requires_grad for p in by_name.model.parameters())
    assert by_name.tokenizer is None
    assert not by_name.takes_mask
    assert by_name.likelihood == "categorical"
    assert "not known" in by_name.notes[0]
    net = load_model("own_networks.py:Net", dtype=torch.float64)
    assert next(net.model.parameters()).dtype == torch.float64
    assert net.takes_mask
    assert net.vocabulary == 7


def test_files_beside_the_file_can_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "width_of_it.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom width_of_it import WIDTH\n"
        "def build():\n    return nn.Linear(WIDTH, 1)\n"
    )
    assert load_model(f"{tmp_path / 'net.py'}:build").model.in_features == 5


def test_the_plan_of_a_module_takes_no_memory(module):
    """In a process of its own: the tests' poisoned allocators escape the meta device."""
    code = """
from deaddir_fast.scan.load_model import plan_model
plan = plan_model("own_networks:build")
assert plan.parameters == 3 * 4 + 4 + 4 * 2 + 2
assert plan.shapes["2.weight"] == ((2, 4), "F32")
assert plan.architecture == "Sequential"
assert plan_model("own_networks:vast").parameters == 10**12
stubborn = plan_model("own_networks:stubborn")
assert stubborn.parameters is None
assert stubborn.shapes == {}
assert any("cannot be built without memory" in line for line in stubborn.unknown)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("wrong", TypeError, "returned int, not an nn.Module"),
        ("number", TypeError, "not callable"),
        ("missing", AttributeError, "missing"),
        ("bare", ValueError, "no parameters"),
    ],
)
def test_what_is_no_network_is_refused(module, name, kind, message):
    with pytest.raises(kind, match=message):
        load_model(f"own_networks:{name}")


def test_places_that_are_none(tmp_path):
    with pytest.raises(ImportError, match="no such file"):
        load_model(f"{tmp_path / 'none.py'}:build")
    with pytest.raises(ImportError):
        load_model("no_module_of_that_name:build")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(str(tmp_path / "none"))
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ValueError, match=r"got the file .*weights.pt"):
        load_model(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="dtype"):
        load_model("no_module_of_that_name:build", dtype=torch.int64)


def test_fingerprint_sees_every_bit_and_name():
    torch.manual_seed(0)

    def net(**changes):
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(
            changes.get("dtype", torch.float32)
        )
        module.load_state_dict(saved)
        return module

    saved = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).state_dict()
    first = fingerprint(net())
    assert len(first) == 32
    assert fingerprint(net()) == first
    seen = {first, fingerprint(net(dtype=torch.float64)), fingerprint(net(dtype=torch.bfloat16))}
    for name in saved:
        changed = net()
        value = changed.state_dict()[name].view(-1)
        value[0] = torch.nextafter(value[0], value[0] + 1) if value.is_floating_point() else 5
        seen.add(fingerprint(changed))
    seen.add(fingerprint(nn.ModuleDict({"a": net()})))
    flat = net()
    flat[0].weight.data = flat[0].weight.data.reshape(3, 2).T.contiguous().T  # the same values
    assert fingerprint(flat) == first
    flat[0].weight.data = flat[0].weight.data.reshape(2, 3)  # the same bytes
    seen.add(fingerprint(flat))
    assert len(seen) == 3 + len(saved) + 2


# --------------------------------------------------------------------------------- refused folders


def folder(path, config, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return str(path)


BERT = {"model_type": "bert", "architectures": ["BertModel"]}


def test_pickled_weights_are_refused(tmp_path):
    source = folder(tmp_path, BERT, pytorch_model__bin=b"pickle", flax_model__msgpack=b"x")
    for read in (load_model, plan_model):
        with pytest.raises(ValueError, match=r"only flax_model.msgpack, pytorch_model.bin"):
            read(source)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         ValueError, "T5ForConditionalGeneration, which needs a target text"),
        ({**BERT, "quantization_config": {"bits": 4}}, ValueError, "quantised"),
        (BERT, ValueError, "found none"),
    ],
)  # fmt: skip
def test_other_refusals(tmp_path, config, kind, message):
    with pytest.raises(kind, match=message):
        plan_model(folder(tmp_path, config))


def test_broken_folders_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config.json"):
        plan_model(str(tmp_path))
    source = folder(tmp_path, BERT, model__safetensors=b"\xff" * 20)
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        plan_model(source)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002"):
        plan_model(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        plan_model(source)


def test_the_plan_reads_headers(tmp_path):
    source = folder(tmp_path, {**BERT, "vocab_size": 9, "max_position_embeddings": 5})
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16),
               "ids": torch.zeros(5, dtype=torch.long)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    plan = plan_model(source)
    assert plan.shapes == {"a": ((2, 3), "F32"), "b": ((4,), "BF16"), "ids": ((5,), "I64")}
    assert plan.parameters == 10
    assert plan.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert (plan.vocabulary, plan.maximum_length, plan.likelihood) == (9, 5, "gaussian")


@pytest.mark.parametrize(
    ("config", "likelihood"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "categorical"),
        ({"architectures": ["LlamaForCausalLM"]}, "categorical"),
        ({"architectures": ["BertForSequenceClassification"]}, "categorical"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}},
            "gaussian",
        ),
        (
            {
                "architectures": ["BertForSequenceClassification"],
                "problem_type": "multi_label_classification",
            },
            "bernoulli",
        ),
        ({"architectures": ["LlamaModel"]}, "gaussian"),
        ({}, "gaussian"),
    ],
)
def test_the_likelihood_follows_from_the_head(tmp_path, config, likelihood):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert plan_model(folder(tmp_path, config)).likelihood == likelihood


def test_without_transformers_the_error_says_what_to_install(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    source = folder(tmp_path, BERT)
    code = f"""
import sys
sys.modules["transformers"] = None
sys.modules["huggingface_hub"] = None
from deaddir_fast.scan.load_model import load_model
for source in ({source!r}, "owner/name"):
    try:
        load_model(source)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'deaddir_fast[hf]'") == 2


def test_poolings():
    hidden = torch.tensor(
        [[[1.0, -2.0], [3.0, 5.0], [9.0, 9.0]], [[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]]]
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = {
        "cls": [[1, -2], [1, 2]],
        "max": [[3, 5], [8, 4]],
        "mean": [[2, 1.5], [4, 2]],
        "mean_sqrt_len": [[4 / 2**0.5, 3 / 2**0.5], [12 / 3**0.5, 6 / 3**0.5]],
        "weightedmean": [[7 / 3, 8 / 3], [31 / 6, 10 / 6]],
        "lasttoken": [[3, 5], [8, 0]],
    }
    assert set(expected) == set(encoders.POOLINGS)
    for how, rows in expected.items():
        torch.testing.assert_close(encoders.pool(hidden, mask, how), torch.tensor(rows).float())


# ------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
         "intermediate_size": 12, "max_position_embeddings": 16}  # fmt: skip


def _llama(hf):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1))


def _gpt2(hf):
    config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=40, n_positions=16)
    return hf.GPT2LMHeadModel(config)


def _bert(hf):
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL))


def _classifier(hf):
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3))


def _neox(hf):
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL))


def _mixtral(hf):
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)
    )


def batch(vocabulary=40):
    ids = torch.randint(0, vocabulary, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("build", [_llama, _gpt2, _bert, _classifier, _neox, _mixtral])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_saved_models_come_back(hf, tmp_path, build, dtype):
    torch.manual_seed(0)
    original = build(hf).eval()
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=dtype)
    assert type(loaded.model) is type(original)
    assert loaded.likelihood == "categorical"
    assert (loaded.vocabulary, loaded.maximum_length) == (40, 16)
    assert loaded.tokenizer is None
    assert loaded.takes_mask
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    wanted = dict(original.to(dtype or torch.float32).named_parameters())
    found = dict(loaded.model.named_parameters())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    inputs = batch()
    grouped = getattr(original.config, "_experts_implementation", None) == "grouped_mm"
    if dtype == torch.float64 and build is _mixtral and grouped:
        assert any("batched" in note for note in loaded.notes)
        original.set_experts_implementation("batched_mm")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, original(**inputs).logits)
    plan = plan_model(str(tmp_path))
    assert plan.parameters == sum(p.numel() for p in original.parameters())
    assert plan.architecture == type(original).__name__
    assert plan.likelihood == "categorical"
    assert (plan.vocabulary, plan.maximum_length) == (40, 16)


def test_half_precision_stays_as_stored(hf, tmp_path):
    _llama(hf).to(torch.bfloat16).save_pretrained(tmp_path)
    assert next(load_model(str(tmp_path)).model.parameters()).dtype == torch.bfloat16


def test_shards(hf, tmp_path):
    original = _llama(hf)
    original.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load_model(str(tmp_path)).fingerprint == fingerprint(original)
    assert plan_model(str(tmp_path)).parameters == sum(p.numel() for p in original.parameters())


def test_missing_weights_are_not_made_up(hf, tmp_path):
    _bert(hf).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"would be random: .*layer.1.output.dense.weight"):
        load_model(str(tmp_path))


def test_encoders_return_hidden_states_without_padding(hf, tmp_path):
    original = hf.BertModel(hf.BertConfig(**SMALL)).eval()
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.likelihood == "gaussian"
    assert "transformer.encoder.layer.0.attention.self.query.weight" in dict(
        loaded.model.named_parameters()
    )
    assert any("pooler" in note for note in loaded.notes)
    inputs = batch()
    hidden = original(**inputs).last_hidden_state
    found = loaded.model(**inputs)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[real], hidden[real])
    assert not found[~real].any()


def test_a_hugging_face_model_of_ones_own(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_bert.py").write_text(
        "import transformers as t\n"
        f"CONFIG = t.BertConfig(**{SMALL!r})\n"
        "def encoder():\n    return t.BertModel(CONFIG)\n"
        "def masked():\n    return t.BertForMaskedLM(CONFIG)\n"
    )
    encoder = load_model(f"{tmp_path / 'own_bert.py'}:encoder")
    assert encoder.likelihood == "gaussian"
    assert encoder.model(**batch()).shape == (3, 6, 8)
    masked = load_model(f"{tmp_path / 'own_bert.py'}:masked")
    assert (masked.likelihood, masked.vocabulary, masked.maximum_length) == ("categorical", 40, 16)
    assert masked.notes == ()


def test_code_of_the_checkpoint_is_never_run(hf, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {
        "model_type": "of_ones_own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    }
    source = folder(tmp_path, config, own__py=b"raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|of_ones_own"):
        load_model(source)


def test_roberta_positions_start_behind_the_padding_id(hf, tmp_path):
    config = hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 18}, pad_token_id=1)
    hf.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.maximum_length, loaded.pad_id) == (16, 1)
    ids = torch.full((1, 16), 5)
    loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_hub_ids_come_from_the_cache(hf, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="downloads are off"):
        load_model("owner/name", allow_download=False)
    home = tmp_path / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    original = _bert(hf)
    original.save_pretrained(home / "snapshots" / ("0" * 40))
    monkeypatch.setattr(hub, "list_repo_files", lambda *_: pytest.fail("asked the hub"))
    assert load_model("owner/name").fingerprint == fingerprint(original)
    assert plan_model("owner/name").architecture == "BertForMaskedLM"


def test_hub_ids_outside_the_cache(hf, tmp_path, monkeypatch):
    """What is asked of the hub, answered from here: headers for a plan, a snapshot to load."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original = _bert(hf)
    original.save_pretrained(tmp_path / "there")
    tensors = {k: SimpleNamespace(shape=list(v.shape), dtype="F32")
               for k, v in load_file(tmp_path / "there" / "model.safetensors").items()}  # fmt: skip
    answer = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(hub, "get_safetensors_metadata", lambda _: answer)
    monkeypatch.setattr(hub, "hf_hub_download", lambda _, name: str(tmp_path / "there" / name))
    monkeypatch.setattr(hub, "list_repo_files", lambda _: ["config.json", "model.safetensors"])
    real = hub.snapshot_download

    def snapshot(source, **options):
        return real(source, **options) if "local_files_only" in options else tmp_path / "there"

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    plan = plan_model("owner/name")
    assert plan.parameters == sum(p.numel() for p in original.parameters())
    assert plan.bytes_on_disk is None
    assert load_model("owner/name").fingerprint == fingerprint(original)

    def none(_):
        raise hub.errors.NotASafetensorsRepoError

    monkeypatch.setattr(hub, "get_safetensors_metadata", none)
    monkeypatch.setattr(hub, "list_repo_files", lambda _: ["config.json", "pytorch_model.bin"])
    for read in (plan_model, load_model):
        with pytest.raises(ValueError, match=r"owner/name, found only pytorch_model.bin"):
            read("owner/name")

    def unreachable(_):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(hub, "list_repo_files", unreachable)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        load_model("owner/name")


# --------------------------------------------------------------------------- sentence-transformers


def _tokenizer(hf, path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "man", "is", "eating", "Man"]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=12
    )
    fast.save_pretrained(path)
    return fast


def sentence_folder(hf, path, *, poolings=("mean",), normalize=True, inner="", **settings):
    torch.manual_seed(0)
    encoder = hf.BertModel(hf.BertConfig(**SMALL)).eval()
    encoder.save_pretrained(path / inner)
    kinds = [("Transformer", inner), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": k, "name": str(k), "path": p, "type": f"sentence_transformers.models.{kind}"}
        for k, (kind, p) in enumerate(kinds[: 3 if normalize else 2])
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    pooling = {f"pooling_mode_{v}": k in poolings for k, v in names.items()}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / inner / "sentence_bert_config.json").write_text(json.dumps(settings))
    return encoder, _tokenizer(hf, path / inner)


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_sentence_embeddings(hf, tmp_path, inner):
    encoder, tokenizer = sentence_folder(hf, tmp_path, inner=inner, max_seq_length=6)
    loaded = load_model(str(tmp_path))
    assert (loaded.likelihood, loaded.maximum_length, loaded.pad_id) == ("gaussian", 6, 0)
    assert plan_model(str(tmp_path)).maximum_length == 6
    (tmp_path / "text.txt").write_text("a man is eating\na\n")
    data = load_data(tmp_path / "text.txt", tokenizer=loaded.tokenizer, length=6)
    first = data.batch(0)
    whole = tokenizer(["a man is eating", "a"], padding=True, return_tensors="pt")
    assert torch.equal(first["input_ids"], whole["input_ids"])
    assert torch.equal(first["attention_mask"], whole["attention_mask"])
    found = loaded.model(**first)
    for k, ids in enumerate([[1, 4, 5, 6, 7, 2], [1, 4, 2]]):  # each alone, without padding
        mean = encoder(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(found[k], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert "transformer.encoder.layer.0.attention.self.query.weight" in dict(
        loaded.model.named_parameters()
    )


def test_poolings_stand_side_by_side(hf, tmp_path):
    encoder, _ = sentence_folder(hf, tmp_path, poolings=("cls", "max"), normalize=False)
    ids = torch.tensor([[1, 4, 5, 2]])
    hidden = encoder(input_ids=ids).last_hidden_state
    wanted = torch.cat([hidden[:, 0], hidden.amax(1)], 1)
    torch.testing.assert_close(load_model(str(tmp_path)).model(input_ids=ids), wanted)


def test_lower_case_comes_before_the_tokenizer(hf, tmp_path):
    sentence_folder(hf, tmp_path / "kept")
    sentence_folder(hf, tmp_path / "lower", do_lower_case=True)
    ids = [
        load_model(str(tmp_path / name)).tokenizer(["Man"])["input_ids"][0]
        for name in ("kept", "lower")
    ]
    assert ids == [[1, 8, 2], [1, 5, 2]]


def test_other_sentence_modules_are_refused(hf, tmp_path):
    sentence_folder(hf, tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="'Dense'"):
        load_model(str(tmp_path))


def slope_squared(model, inputs, likelihood, name, u):
    """Mean over samples of |e|², e the whitened derivative of the outputs along u by autograd."""
    weights = dict(model.named_parameters())

    def outputs(weight):
        return model_output(functional_call(model, {**weights, name: weight}, (), inputs))

    with sdpa_kernel(SDPBackend.MATH):
        at, slope = torch.func.jvp(outputs, (weights[name],), (u / u.norm(),))
    if likelihood == "categorical":
        p = at.softmax(-1)
        slope = p.sqrt() * (slope - (p * slope).sum(-1, keepdim=True))
    return float(slope.square().flatten(1).sum(1).mean())


def needs_traceable_masks(hf):
    if int(hf.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 reads the mask")


@pytest.mark.slow
def test_embeddings_can_be_read(hf, tmp_path):
    """The Gaussian Fisher along a ray is |J u|², J u by autograd; with padding."""
    needs_traceable_masks(hf)
    sentence_folder(hf, tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float64)
    inputs = batch(9)
    name = "transformer.encoder.layer.1.output.dense.weight"
    u = torch.randn(1, 8, 12, dtype=torch.float64)
    rays = dd.ray_curvature(loaded.model, inputs, {name: u}, [0.0], likelihood="gaussian")
    wanted = slope_squared(loaded.model, inputs, "gaussian", name, u[0])
    assert float(rays.fisher[0, 0]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (_llama, "model.layers.0.self_attn.v_proj.weight"),
        (_gpt2, "transformer.h.0.mlp.c_fc.weight"),
        (_bert, "bert.encoder.layer.0.attention.self.value.weight"),
        (_classifier, "bert.encoder.layer.0.attention.self.value.weight"),
        (_neox, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"),
        (_mixtral, "model.layers.0.self_attn.v_proj.weight"),
    ],
)
def test_padded_batches_can_be_read(hf, tmp_path, build, name):
    """A trace cannot look whether a mask is all ones; the same Fisher by autograd."""
    needs_traceable_masks(hf)
    torch.manual_seed(0)
    build(hf).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float64)
    inputs = batch()
    u = torch.randn(dict(loaded.model.named_parameters())[name].shape, dtype=torch.float64)
    rays = dd.ray_curvature(
        loaded.model, inputs, {name: u[None]}, [0.0], likelihood=loaded.likelihood
    )
    wanted = slope_squared(loaded.model, inputs, loaded.likelihood, name, u)
    assert float(rays.fisher[0, 0]) == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------- a trained network


@pytest.mark.slow
def test_trained_sentence_embeddings(hf, tmp_path):
    loaded = load_model(str(minilm()))
    assert (loaded.vocabulary, loaded.maximum_length, loaded.pad_id) == (30522, 256, 0)
    (tmp_path / "sentences.txt").write_text(
        "A man is eating food.\nA man eats something.\nThe stock market fell sharply today.\n"
    )
    data = load_data(tmp_path / "sentences.txt", tokenizer=loaded.tokenizer, length=256)
    e = loaded.model(**data.batch(0))
    assert e.shape == (3, 384)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    similar = e @ e.T
    assert similar[0, 1] > 0.7
    assert similar[0, 2].abs() < 0.2
    readme = Path(__file__).parents[2] / "README.md"
    data = load_data(
        readme, tokenizer=loaded.tokenizer, length=64, batch=8, vocabulary=loaded.vocabulary
    )
    assert data.samples > 30
    assert data.tokens > 3000
    for inputs in data.batches():
        out = loaded.model(**inputs)
        assert bool(torch.isfinite(out).all())
        assert inputs["input_ids"].shape[1] <= 64
