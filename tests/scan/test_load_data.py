"""Files as batches: what the samples are, in which order, and what is refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from deaddir_fast.scan.load_data import load_data

CLS, SEP, PAD = 1, 2, 3


class Words:
    """A tokenizer of transformers as far as it is used: word lengths + 10, [CLS] … [SEP]."""

    model_max_length = 10**30
    pad_token_id = PAD

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        assert isinstance(texts, list)
        plain = [[len(word) + 10 for word in text.split()] for text in texts]
        special = [[CLS, *ids, SEP] for ids in plain]
        return {"input_ids": special if add_special_tokens else plain}


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def rows(data):
    """Samples without padding."""
    out = []
    for batch in data.batches():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        out += [i[m == 1].tolist() for i, m in zip(ids, mask, strict=True)]
    return out


def jsonl(path, *objects):
    return write(path, "".join(json.dumps(x) + "\n" for x in objects))


# -------------------------------------------------------------------------------------------- text


def test_paragraphs_where_there_are_blank_lines(tmp_path):
    path = write(tmp_path / "a.txt", "\n\none two\nthree\n \t\n\nfour\n\n")
    data = load_data(path, tokenizer=Words())
    assert rows(data) == [[CLS, 13, 13, 15, SEP], [CLS, 14, SEP]]
    assert data.samples == 2
    assert data.tokens == 8
    assert "2 paragraphs" in data.notes[0]


def test_lines_where_there_are_none(tmp_path):
    data = load_data(write(tmp_path / "a.md", "one two\n three\r\nfour\n"), tokenizer=Words())
    assert rows(data) == [[CLS, 13, 13, SEP], [CLS, 15, SEP], [CLS, 14, SEP]]
    assert "3 lines" in data.notes[0]


def test_long_texts_are_cut_and_every_piece_has_its_special_tokens(tmp_path):
    path = write(tmp_path / "a.txt", "a bb ccc dddd eeeee\nffffff")
    data = load_data(path, tokenizer=Words(), length=4)
    assert rows(data) == [
        [CLS, 11, 12, SEP],
        [CLS, 13, 14, SEP],
        [CLS, 15, SEP],
        [CLS, 16, SEP],
    ]
    assert "1 longer than 4 tokens" in data.notes[0]
    with pytest.raises(ValueError, match="length: expected at least 3"):
        load_data(path, tokenizer=Words(), length=2)


def test_the_tokenizers_own_limit_holds(tmp_path):
    tokenizer = Words()
    tokenizer.model_max_length = 4
    path = write(tmp_path / "a.txt", "a b c d e")
    assert [len(r) for r in rows(load_data(path, tokenizer=tokenizer))] == [4, 4, 3]
    assert [len(r) for r in rows(load_data(path, tokenizer=tokenizer, length=9))] == [7]


def test_padding_is_on_the_right_to_the_longest_of_the_batch(tmp_path):
    path = write(tmp_path / "a.txt", "a\na b c\na b")
    data = load_data(path, tokenizer=Words(), batch=2)
    first, second = data.batches()
    assert first["input_ids"].tolist() == [[CLS, 11, SEP, PAD, PAD], [CLS, 11, 11, 11, SEP]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1]]
    other = load_data(path, tokenizer=Words(), batch=2, pad_id=7)
    assert other.batch(0)["input_ids"][0].tolist() == [CLS, 11, SEP, 7, 7]


def test_text_wants_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        load_data(write(tmp_path / "a.txt", "word"))


# ------------------------------------------------------------------------------------------- JSONL


def test_jsonl_of_text(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", {"body": "a b", "labels": 1}, {"body": "c", "labels": 0, "x": []}
    )
    data = load_data(path, tokenizer=Words(), text_field="body")
    assert rows(data) == [[CLS, 11, 11, SEP], [CLS, 11, SEP]]
    assert data.labels(0).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"line 1: a labelled text of 2 tokens"):
        load_data(path, tokenizer=Words(), text_field="body", length=3)


def test_texts_without_a_token_are_left_out_with_their_labels(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "a", "labels": 1},
        {"text": " ", "labels": 2},
        {"text": "b b", "labels": 3},
    )
    data = load_data(path, tokenizer=Words())
    assert rows(data) == [[CLS, 11, SEP], [CLS, 11, 11, SEP]]
    assert data.labels(0).tolist() == [1, 3]
    assert "1 texts without a token left out" in data.notes


def test_jsonl_of_ids(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
        {"input_ids": [8], "labels": [9]},
    )
    data = load_data(path)
    assert rows(data) == [[5, 6, 7], [8]]
    assert data.labels(0).tolist() == [[6, 7, -100], [9, -100, -100]]
    cut = load_data(path, length=2)
    assert rows(cut) == [[5, 6], [7], [8]]
    assert cut.labels(0).tolist() == [[6, 7], [-100, -100], [9, -100]]
    assert load_data(path, samples=1, seed=3).labels(0) is not None


def test_a_mask_in_the_file_says_what_is_padding(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [7, 0], "attention_mask": [1, 0]},
    )
    data = load_data(path, pad_id=9)
    assert rows(data) == [[5, 6], [7]]
    assert data.batch(0)["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert data.tokens == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "", "{oops"], "line 3: expected a JSON object"),
        (['{"text": "a"}', "[1]"], "line 2: expected a JSON object with 'text', got list"),
        (['{"words": "a"}'], r"line 1: .* 'input_ids' or 'text', got one with \['words'\]"),
        (['{"text": "a"}', '{"input_ids": [1]}'], "line 2: expected a JSON object with 'text'"),
        (['{"text": 3}'], "line 1: text: expected a string, got int"),
        (
            ['{"input_ids": [1, 2.5]}'],
            "line 1: input_ids: expected integers, got 2.5 at position 1",
        ),
        (['{"input_ids": [1, true]}'], "got True at position 1"),
        (['{"input_ids": []}'], "line 1: input_ids: expected a list of ids"),
        (['{"input_ids": 4}'], "line 1: input_ids: expected a list of ids, got 4"),
        (['{"input_ids": [99999999999999999999]}'], r"line 1: input_ids: .* below 2\^63"),
        (['{"input_ids": [1], "labels": [1, 2]}'], "line 1: labels: expected 1 numbers"),
        (['{"input_ids": [1], "labels": 0}', '{"input_ids": [1]}'], "line 2: labels: .* has it"),
        (['{"input_ids": [1]}', '{"input_ids": [1], "labels": 0}'], "line 2: labels: .* lacks it"),
        (
            ['{"input_ids": [1], "labels": 0}', '{"input_ids": [1], "labels": [0]}'],
            "line 2: labels: expected a number, as on line 1",
        ),
        (['{"input_ids": [1, 2], "attention_mask": [1]}'], "attention_mask: expected 2 numbers"),
        (
            ['{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}'],
            "line 1: attention_mask: .*run",
        ),
        (['{"input_ids": [1], "attention_mask": [0]}'], "line 1: attention_mask: .* run of ones"),
        (['{"input_ids": [1], "attention_mask": [2]}'], "line 1: attention_mask: expected 0 and 1"),
        (['{"text": "a", "labels": [1]}'], "line 1: labels: text has no tokens yet"),
        (['{"input_ids": [1]}', '{"input_ids": [4, 8]}'], "line 2: input_ids: .* 8 at position 1"),
        (['{"input_ids": [1, -1]}'], "got -1 at position 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        load_data(path, tokenizer=Words(), vocabulary=8)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, ">i4"])
def test_npy_of_ids(tmp_path, dtype):
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "a.npy", ids.astype(dtype))
    data = load_data(tmp_path / "a.npy", vocabulary=12)
    assert rows(data) == ids.tolist()
    assert data.labels(0) is None
    assert rows(load_data(tmp_path / "a.npy", length=3)) == [
        [0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10], [11]
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"row 2: input_ids: .* got 11 at position 3"):
        load_data(tmp_path / "a.npy", vocabulary=11)
    with pytest.raises(ValueError, match=r"row 2: input_ids: .* got 11 at position 3"):
        load_data(tmp_path / "a.npy", vocabulary=11, length=2)


def test_a_stream_of_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(7, dtype=np.uint16))
    assert rows(load_data(tmp_path / "a.npy", length=3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_models_that_take_only_ids_get_only_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(8).reshape(2, 4))
    data = load_data(tmp_path / "a.npy", mask=False)
    assert torch.equal(data.batch(0), torch.arange(8).reshape(2, 4))
    with pytest.raises(ValueError, match="different lengths"):
        load_data(tmp_path / "a.npy", mask=False, length=3)
    assert len(load_data(tmp_path / "a.npy", mask=False, length=3, batch=1)) == 4
    assert len(load_data(tmp_path / "a.npy", mask=False, length=2)) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
def test_npy_of_floats(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    data = load_data(tmp_path / "a.npy", batch=2)
    assert [b.shape[0] for b in data.batches()] == [2, 2, 1]
    assert np.array_equal(torch.cat(list(data.batches())).numpy(), x)
    assert (data.kind, data.samples, data.tokens) == ("floats", 5, 5)
    double = load_data(tmp_path / "a.npy", dtype=torch.float64).batch(0)
    assert double.dtype == torch.float64
    assert np.array_equal(double.numpy(), x)


def test_safetensors_of_ids(tmp_path):
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    labels = torch.tensor([4, 5, 6])
    save_file(
        {"input_ids": ids, "attention_mask": mask, "labels": labels}, tmp_path / "a.safetensors"
    )
    data = load_data(tmp_path / "a.safetensors", batch=2)
    assert rows(data) == [[0, 1, 2, 3], [4, 5], [9, 10, 11]]
    assert data.labels(0).tolist() == [4, 5]
    assert data.labels(1).tolist() == [6]
    with pytest.raises(ValueError, match=r"row 0: a sample with one label does not fit .* 3"):
        load_data(tmp_path / "a.safetensors", length=3)
    save_file({"input_ids": ids, "labels": ids + 1}, tmp_path / "b.safetensors")
    assert load_data(tmp_path / "b.safetensors", length=3).labels(0).tolist()[1] == [4, -100, -100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_of_floats(tmp_path, dtype):
    x = torch.randn(5, 3).to(dtype)
    save_file({"inputs": x, "labels": torch.arange(5)}, tmp_path / "a.safetensors")
    data = load_data(tmp_path / "a.safetensors", batch=3)
    assert torch.equal(torch.cat(list(data.batches())), x)
    assert data.labels(1).tolist() == [3, 4]


def test_one_batch_reads_only_its_rows(tmp_path, monkeypatch):
    """Through the memory map: rows asked for, none of the ones before."""
    np.save(tmp_path / "a.npy", np.arange(40.0).reshape(20, 2))
    save_file({"inputs": torch.arange(40.0).reshape(20, 2)}, tmp_path / "a.safetensors")
    asked = []
    for name in ("a.npy", "a.safetensors"):
        data = load_data(tmp_path / name, batch=3)
        kind = type(data._rows)
        original = kind.__getitem__

        def asking(self, part, get=original):
            asked.append(part)
            return get(self, part)

        monkeypatch.setattr(kind, "__getitem__", asking)
        asked.clear()
        assert torch.equal(data.batch(5), torch.arange(30.0, 36.0).reshape(3, 2))
        assert asked == [slice(15, 16), slice(16, 17), slice(17, 18)]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(2, 2)}, r"'input_ids' or 'inputs', got \['x'\]"),
        (
            {"inputs": torch.zeros(2, 2), "input_ids": torch.zeros(2, 2, dtype=torch.long)},
            "expected one tensor",
        ),
        ({"input_ids": torch.zeros(2, 2)}, r"integers \(n, t\), got floats of shape \(2, 2\)"),
        ({"inputs": torch.zeros(2, 2, dtype=torch.long)}, r"floats \(n, ...\), got integers"),
        ({"inputs": torch.zeros(2)}, r"got floats of shape \(2,\)"),
        ({"input_ids": torch.zeros(2, 2, 2, dtype=torch.long)}, "got integers of shape"),
        (
            {
                "input_ids": torch.zeros(2, 2, dtype=torch.long),
                "attention_mask": torch.ones(2, 3, dtype=torch.long),
            },
            r"attention_mask: .* got \(2, 3\)",
        ),
        ({"inputs": torch.zeros(2, 2), "labels": torch.zeros(3)}, r"labels: .* got shape \(3,\)"),
        (
            {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2, 2)},
            r"labels: .* got shape \(2, 2\)",
        ),
        ({"inputs": torch.tensor([[1.0], [torch.nan]])}, "row 1: expected finite numbers"),
        ({"inputs": torch.zeros(0, 2)}, "is empty"),
        ({"inputs": torch.zeros(2, 2, dtype=torch.complex64)}, "expected integers or floats"),
    ],
)
def test_bad_tensors_are_named(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_data(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"floats \(n, ...\), got shape \(3,\)"),
        (np.zeros((2, 2, 2), dtype=int), r"integers \(n, t\) or \(t,\), got shape"),
        (np.zeros((2, 2), dtype=bool), "got bool"),
        (np.zeros((2, 2), dtype=complex), "got complex128"),
        (np.array([["a"]]), "got <U1"),
        (np.array([[1.0, np.inf]]), "row 0: expected finite"),
        (np.zeros((0, 3)), "at least one"),
        (np.zeros((3, 0), dtype=int), "at least one"),
        (np.zeros(0, dtype=int), "at least one"),
    ],
)
def test_bad_arrays_are_named(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "a.npy")


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    np.save(tmp_path / "objects.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(ValueError, match=name):
            load_data(tmp_path / name)
    np.savez(tmp_path / "archive.npz", np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match="an archive"):
        load_data(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match=r"expected text, .jsonl, .npy or .safetensors"):
        load_data(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.npy", "a.safetensors"])
def test_empty_files_are_refused(tmp_path, name):
    for content in ("", " \n\n") if name in ("a.txt", "a.jsonl") else ("",):
        with pytest.raises(ValueError, match=name):
            load_data(write(tmp_path / name, content), tokenizer=Words())
    with pytest.raises(FileNotFoundError, match="no file"):
        load_data(tmp_path / f"other-{name}", tokenizer=Words())


def test_what_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        load_data(tmp_path / "a.txt", tokenizer=Words())


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"batch": 2.0}, {"length": 0}, {"samples": 0}, {"seed": -1}, {"pad_id": -1},
     {"dtype": torch.int64}],
)  # fmt: skip
def test_bad_arguments_are_named(tmp_path, wrong):
    np.save(tmp_path / "a.npy", np.arange(8).reshape(2, 4))
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        load_data(tmp_path / "a.npy", **wrong)


# ------------------------------------------------------------------------------------------- order


@given(
    n=st.integers(1, 40), size=st.integers(1, 9), count=st.integers(1, 12), seed=st.integers(0, 9)
)
def test_batches_and_shards_are_a_fixed_partition(tmp_path_factory, n, size, count, seed):
    path = tmp_path_factory.mktemp("data") / "a.npy"
    np.save(path, np.arange(n, dtype=float)[:, None])
    data = load_data(path, batch=size, seed=seed)
    once = [b.flatten().tolist() for b in data.batches()]
    assert once == [b.flatten().tolist() for b in data.batches()]
    assert [x for batch in once for x in batch] == list(range(n))
    assert len(data) == len(once) == -(-n // size)
    assert [data.batch(k).flatten().tolist() for k in range(len(data))] == once
    shards = data.shards(count)
    assert [k for shard in shards for k in shard] == list(range(len(data)))
    assert len(shards) == min(count, len(data))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert min(map(len, shards)) >= 1
    with pytest.raises(IndexError, match="batch"):
        data.batch(len(data))
    with pytest.raises(IndexError, match="batch"):
        data.batch(-1)


def test_some_samples_are_drawn_by_seed_in_the_order_of_the_file(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=float)[:, None])

    def drawn(**given):
        return load_data(tmp_path / "a.npy", batch=7, **given).batch(0).flatten().tolist()

    first = drawn(samples=5)
    assert first == sorted(set(first))
    assert len(first) == 5
    assert drawn(samples=5) == first
    assert drawn(samples=5, seed=1) != first
    every = load_data(tmp_path / "a.npy", samples=1000)
    assert every.samples == 100
    assert every.notes == ()


def test_every_sample_is_drawn_as_often(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=float)[:, None])
    counts = np.zeros(6)
    for seed in range(600):
        x = load_data(tmp_path / "a.npy", samples=2, seed=seed).batch(0).flatten().int()
        counts[x.tolist()] += 1
    # 200 each, standard deviation sqrt(600 · 1/3 · 2/3) = 11.5
    assert np.abs(counts - 200).max() < 5 * 11.5


def test_the_fingerprint_is_that_of_the_samples(tmp_path):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    np.save(tmp_path / "a.npy", ids.numpy().astype(np.uint16))
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    jsonl(tmp_path / "a.jsonl", *({"input_ids": row} for row in ids.tolist()))
    same = {load_data(tmp_path / f"a.{end}").fingerprint for end in ("npy", "safetensors", "jsonl")}
    same.add(load_data(tmp_path / "a.npy", batch=1).fingerprint)
    assert len(same) == 1
    assert len(same.copy().pop()) == 32
    others = {load_data(tmp_path / "a.npy", length=2).fingerprint}
    for k in range(6):
        changed = ids.clone()
        changed.view(-1)[k] += 1
        np.save(tmp_path / "b.npy", changed.numpy())
        others.add(load_data(tmp_path / "b.npy").fingerprint)
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "c.safetensors")
    others.add(load_data(tmp_path / "c.safetensors").fingerprint)
    others.add(load_data(tmp_path / "a.npy", samples=1).fingerprint)
    assert len(others | same) == 10


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.jsonl"])
def test_data_can_be_sent_to_another_process(tmp_path, name):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2))
    save_file({"input_ids": torch.arange(6).reshape(3, 2)}, tmp_path / "a.safetensors")
    jsonl(tmp_path / "a.jsonl", *({"input_ids": [2 * k, 2 * k + 1]} for k in range(3)))
    data = load_data(tmp_path / name, batch=2)
    copy = pickle.loads(pickle.dumps(data))
    assert rows(copy) == rows(data) == [[0, 1], [2, 3], [4, 5]]
