"""Data, prompts, encoding, scores, batch order and report of `zo_fused.task`."""

import csv
import json
import math

import pytest
import torch
from torch import nn

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from support.tiny_models import opt_tokenizer  # noqa: E402

from zo_fused.task.adapters import SCHEMES, load_adapted, prepended_logits  # noqa: E402
from zo_fused.task.data import Example, read_examples  # noqa: E402
from zo_fused.task.encoding import Encoder, answer_ids, maximum_length, plain_ids  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.files import to_json  # noqa: E402
from zo_fused.task.history import History, read_history  # noqa: E402
from zo_fused.task.order import batch_indices  # noqa: E402
from zo_fused.task.prompt import Task  # noqa: E402
from zo_fused.task.report import smooth, summarize, table  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402

ANSWERS = {"negative": " terrible", "positive": " great"}
SENTIMENT = Task("{text} It was", ANSWERS)


# ---- templates and verbalizers -------------------------------------------------------------------


def test_prompts_paste_fields_as_they_are():
    task = Task('{premise}\nSo "{hypothesis}"? {{Yes or No}}\n', {"0": "Yes", "1": "No"})
    assert task.fields == ("premise", "hypothesis")
    record = {"premise": "A {b} c.", "hypothesis": "{hypothesis}", "rest": 1}
    assert task.prompt(record) == 'A {b} c.\nSo "{hypothesis}"? {Yes or No}\n'


def test_a_task_without_words_keeps_fields_and_answers():
    task = Task("{premise}? {{So}} {hypothesis}, {premise}", {"0": "Yes", "1": "No"})
    bare = task.without_words()
    assert bare.prompt({"premise": "A {b}", "hypothesis": "c"}) == "A {b} c"
    assert (bare.fields, bare.verbalizer) == (task.fields, task.verbalizer)


@pytest.mark.parametrize(
    ("template", "verbalizer", "message"),
    [
        ("It was", ANSWERS, "no placeholder"),
        ("{text", ANSWERS, "malformed"),
        ("{} It was", ANSWERS, "'{}' is not a field name"),
        ("{text.x} It was", ANSWERS, "'{text.x}' is not a field name"),
        ("{text!r} It was", ANSWERS, "'{text!r}' is not a field name"),
        ("{text:>9} It was", ANSWERS, "'{text:>9}' is not a field name"),
        ("{text}", {"a": "x"}, "at least two labels"),
        ("{text}", {"a": "x", "b": " "}, "label 'b' is empty"),
        ("{text}", {"a": "x", "b": "x"}, "labels 'a' and 'b' the same answer 'x'"),
        ("{text} was", {"a": " bad", "b": "good"}, "would read 'wasgood' after the template"),
    ],
)
def test_a_bad_task_is_refused(template, verbalizer, message):
    with pytest.raises(UserError) as error:
        Task(template, verbalizer)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"verbalizer": {}}', "no string named 'template'"),
        ('{"template": "{t}", "verbalizer": {"a": 1}}', "no 'verbalizer' from labels to strings"),
        ('{"template": "{t}", "verbalizer": {}}', "task.json, the verbalizer needs at least two"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path, content, message):
    path = tmp_path / "task.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        Task.from_file(path)
    assert message in str(error.value)
    assert "task.json" in str(error.value)


def test_a_missing_task_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"can't read the task file .*No such file"):
        Task.from_file(tmp_path / "task.json")


# ---- data ----------------------------------------------------------------------------------------

GOOD = '{"text": "Fine.", "label": "positive", "id": 7}'


def test_examples_keep_every_field_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\n".encode() + GOOD.encode())
    examples = read_examples(str(path), SENTIMENT)
    assert examples == read_examples(str(tmp_path), SENTIMENT, "train")
    assert examples[0].fields == {"text": "Fine.", "label": "positive", "id": 7}
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
        (b'{"label": "positive", "a": 1}', "no field 'text' (the template uses it); its fields are: 'label', 'a'"),  # noqa: E501
        (b'{"text": "x"}', "no field 'label'; its fields are: 'text'"),
        (b'{"text": null, "label": "positive"}', "field 'text' is not text but null"),
        (b'{"text": ["x"], "label": "positive"}', "field 'text' is not text but a list"),
        (b'{"text": "x", "label": "odd"}', "label 'odd' has no answer in the verbalizer, which has 'negative', 'positive'"),  # noqa: E501
        (b'{"text": "x", "label": 1.5}', "field 'label' is no label but a number"),
        (b'{"text": "x", "label": true}', "label 'true' has no answer in the verbalizer, which"),
        (b'{"text": "x", "label": {}}', "field 'label' is no label but an object"),
        (b'{"text": NaN, "label": "positive"}', "field 'text' is not text but nan"),
        (b'{"text": "\\ud83d", "label": "positive"}', "field 'text' is not text but half a char"),
        (b'{"text": "a\x00", "label": "positive"}', "not JSON (Invalid control character at"),
        (b"[" * 100_000, "not JSON ("),
        (b'{"text": ' + b"1" * 9999 + b"}", "not JSON (Exceeds the limit"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_with_its_number(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(UserError) as error:
        read_examples(str(path), SENTIMENT)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no data file .*nowhere\.jsonl"):
        read_examples("nowhere.jsonl", SENTIMENT)
    with pytest.raises(UserError, match=r"has no dev\.jsonl"):
        read_examples(str(tmp_path), SENTIMENT, "dev")
    (tmp_path / "dev.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"dev\.jsonl holds no examples"):
        read_examples(str(tmp_path), SENTIMENT, "dev")
    with pytest.raises(UserError, match="shows the answer"):
        read_examples(str(tmp_path), SENTIMENT, "dev", label_field="text")


RECORDS = [{"text": 'Fine, "so"\nfine.', "label": "positive"}, {"text": "", "label": "negative"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", json.dumps(RECORDS)),
        ("x.jsonl", json.dumps(RECORDS, indent=1)),
        ("x.json", json.dumps({"version": 1, "data": RECORDS})),
        ("x.json", json.dumps({"version": [], "data": RECORDS}["data"], indent=2)),
        ("x.json", "\n".join(map(json.dumps, RECORDS))),
        ("x.csv", 'label,text\npositive,"Fine, ""so""\nfine."\n\nnegative,\n'),
        ("x.csv", '\ufefftext,label\r\n"Fine, ""so""\nfine.",positive\r\n"",negative'),
        ("x.TSV", 'label\ttext\npositive\t"Fine, ""so""\nfine."\nnegative\t\n'),
    ],
)
def test_arrays_and_tables_are_the_same_records(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    examples = read_examples(str(path), SENTIMENT)
    assert [(example.fields, example.label) for example in examples] == [
        (record, record["label"]) for record in RECORDS
    ]


def test_a_file_of_one_record(tmp_path):
    path = tmp_path / "x.json"
    for text in (GOOD, json.dumps(json.loads(GOOD), indent=1)):
        path.write_text(text)
        (example,) = read_examples(str(path), SENTIMENT)
        assert example.fields["id"] == 7


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    rows = {"text": ["Bad.", "Good."], "label": [0, 1]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert [e.label for e in read_examples(str(tmp_path), SENTIMENT)] == list(ANSWERS)
    datasets.Dataset.from_dict({"text": ["x"], "label": [b"x"]}).to_parquet(path)
    with pytest.raises(UserError, match=r"parquet row 1: field 'label' is no label but a bytes"):
        read_examples(str(path), SENTIMENT)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"can't read .*train.parquet: "):
        read_examples(str(path), SENTIMENT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[\n{"text": "a",\n"label" 1}]', ":3: not JSON (Expecting ':' delim"),
        ("x.json", b'[{"text": "a", "label": "positive"}, 3]', " record 2: not a JSON object but"),
        ("x.json", b"[]", " holds no examples"),
        ("x.json", b"", " holds no examples"),
        ("x.json", b'{"train": [], "test": []}', ":1: no field 'text' (the template uses it); its"),
        ("x.txt", b"It was good", ":1: not JSON (Expecting value: column 1); data files end in"),
        ("x.csv", b"", " holds no examples"),
        ("x.csv", b"Good.,positive\nBad,negative", ":2: no field 'text' (the template uses it); "
            "its fields are: 'Good.', 'positive' (the first line of a table must name them)"),
        ("x.csv", b"text,label,text\n", ":1: two columns have the name 'text'"),
        ("x.csv", b"text,label,\n", ":1: a column has no name"),
        ("x.csv", b"text,label\n\nfine\n", ":3: 1 values, but the first line names 2 columns"),
        ("x.csv", b'text,label\n"a\nb",positive\na,b,c', ":4: 3 values, but"),
        ("x.csv", b'text,label\n"a,positive\nb,positive\n', ":2: not a row of a table (unexp"),
        ("x.csv", b"text,label\na,\xff", ":2: not UTF-8 text"),
        ("x.csv", b"text,label\nfine,", ":2: label '' has no answer in the verbalizer"),
    ],
)  # fmt: skip
def test_bad_arrays_and_tables_are_told_with_their_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_examples(str(path), SENTIMENT)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_long_values_and_nul_bytes_of_tables_are_text(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "train.csv").write_text("text,label\n" + "long " * 99_999 + "\0,positive\n")
    (example,) = read_examples(str(tmp_path), SENTIMENT)
    assert example.fields["text"] == "long " * 99_999 + "\0"
    assert csv.field_size_limit() == limit
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(UserError, match=r"has both train\.json and train\.csv"):
        read_examples(str(tmp_path), SENTIMENT)


@pytest.mark.parametrize("keys", [("false", "true"), ("False", "TRUE"), ("0", "1"), ("0.0", "1.0")])
def test_labels_are_the_same_however_they_are_written(tmp_path, keys):
    task = Task("{text} It was", dict(zip(keys, (" bad", " good"), strict=True)))
    written = [True, "true", "True"] if keys[1].isalpha() else [1, 1.0, "1", "1.0"]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in written))
    assert {example.label for example in read_examples(str(path), task)} == {keys[1]}
    twice = Task("{text}", {"1": "a", "1.0": "b", "true": "c"})
    with pytest.raises(UserError, match=r"labels '1' and '1\.0' of the verbalizer are the same"):
        read_examples(str(path), twice)


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` that serves one data set with numbered classes, offline."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    rows = datasets.Dataset.from_dict(
        {"sentence": ["Bad.", "Good."], "label": [0, 1]}, features=features
    )
    hidden = datasets.Dataset.from_dict({"sentence": ["?"], "label": [-1]}, features=features)
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name != "nyu-mll/glue":
            raise FileNotFoundError(f"Couldn't find {name}.\nMore lines")
        return hidden if split == "test" else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_data_sets_of_the_hub(hub):
    by_name = Task("{sentence} It was", ANSWERS)
    by_number = Task("{sentence} It was", {"0": " terrible", "1": " great"})
    labels = [e.label for e in read_examples("nyu-mll/glue:sst2", by_name, "dev")]
    assert labels == ["negative", "positive"]
    labels = [e.label for e in read_examples("nyu-mll/glue::train[:2]", by_number, "dev")]
    assert labels == ["0", "1"]
    assert hub == [("nyu-mll/glue", "sst2", "validation"), ("nyu-mll/glue", None, "train[:2]")]
    with pytest.raises(UserError, match=r"sst2\[test\] row 1: label '-1' has no answer"):
        read_examples("nyu-mll/glue:sst2", by_name, "test")
    with pytest.raises(UserError, match=r"could be loaded \(split 'train'\): Couldn't find x$"):
        read_examples("x", by_name)


# ---- encoding ------------------------------------------------------------------------------------


def byte_level_tokenizer(length=1000):
    """OPT-like; " great" and "Yes" are one token."""
    corpus = ["It was great. It was good. Yes or No?", "a great good film was great"] * 9
    return opt_tokenizer(corpus, 400, model_max_length=length)


def sentencepiece_like_tokenizer():
    """Llama-2-like: a space is put before every text, spaces become "▁"; an eos ends every text."""
    pieces = [
        "<s>",
        "</s>",
        "\n",
        "▁",
        "▁It",
        "▁was",
        "▁great",
        "great",
        "Yes",
        "▁Yes",
        "▁terrible",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split("\n", "isolated"),
            tokenizers.pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def encoder(template, answers, tokenizer=None, max_length=1000):
    verbalizer = {str(index): answer for index, answer in enumerate(answers)}
    return Encoder(Task(template, verbalizer), tokenizer or byte_level_tokenizer(), max_length)


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_golden_encoding():
    tokenizer = byte_level_tokenizer()
    made = encoder("{text} It was", [" great", " good"], tokenizer)
    (encoded,) = made.encode([Example({"text": "a"}, "1", "x:1")])
    assert tokens(tokenizer, encoded.prompt) == ["</s>", "a", "ĠIt", "Ġwas"]
    assert encoded.label == 1
    assert [tokens(tokenizer, ids) for ids in made.answers] == [["Ġgreat"], ["Ġgood"]]


def test_a_merge_across_the_boundary_does_not_move_the_answer():
    tokenizer = byte_level_tokenizer()
    made = encoder("{text} is gre", [" at", "!at"], tokenizer)
    (encoded,) = made.encode([Example({"text": "It"}, "0", "x:1")])
    whole = plain_ids(tokenizer, "It is great")  # "great" is one token, "gre" is none
    assert tokens(tokenizer, whole)[-1] == "Ġgreat"
    text = tokenizer.decode(encoded.prompt[1:])
    assert text == "It is gre"
    assert tokenizer.decode(made.answers[1]) == "!at"


def test_answers_of_sentencepiece_like_tokenizers_get_one_space():
    tokenizer = sentencepiece_like_tokenizer()
    assert tokens(tokenizer, plain_ids(tokenizer, " great")) == ["▁", "▁great"]
    assert tokens(tokenizer, answer_ids(tokenizer, " great")) == ["▁great"]
    assert tokens(tokenizer, answer_ids(tokenizer, "Yes")) == ["Yes"]
    made = encoder("{text} It was", [" great", " terrible"], tokenizer)
    prompt = made.prompt_ids("It was")
    assert tokens(tokenizer, prompt) == ["<s>", "▁It", "▁was"]  # the eos is left out


def test_long_prompts_are_cut_on_the_left():
    tokenizer = byte_level_tokenizer()
    answers = [" great", " great good"]
    full = encoder("{text} It was", answers, tokenizer).prompt_ids("good " * 50 + "It was")
    made = encoder("{text} It was", answers, tokenizer, max_length=20)
    cut = made.prompt_ids("good " * 50 + "It was")
    assert len(cut) + max(map(len, made.answers)) == 20
    assert cut == full[:1] + full[-17:]
    assert made.cut == 1
    assert len(made.prompt_ids("It was")) < made.room
    assert made.cut == 1


def test_encoding_errors():
    with pytest.raises(UserError, match="no room for a prompt: there are 3 tokens for both"):
        encoder("{text} It was", [" great", " good good"], max_length=3)
    tokenizer = sentencepiece_like_tokenizer()
    with pytest.raises(UserError, match=r"same tokens of the answers ' odd' and ' even'"):
        encoder("{text}", [" odd", " even"], tokenizer)
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A"
    )
    with pytest.raises(UserError, match=r"x:1: the prompt is empty"):
        encoder("{text}", ["a", "b"], tokenizer).encode([Example({"text": ""}, "0", "x:1")])


# ---- scores --------------------------------------------------------------------------------------


def tiny_model(kind="opt", vocabulary=400, dtype=torch.float32):
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    if kind == "opt":
        config = transformers.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)
    elif kind == "llama":
        config = transformers.LlamaConfig(**shape, intermediate_size=32)
    else:
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform predictions
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


class Bare(nn.Module):
    """A causal model that takes token ids and a mask only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def example_batch(counts=(5, 9, 2, 9), answers=2):
    from zo_fused.task.encoding import Encoded

    generator = torch.Generator().manual_seed(1)
    return [
        Encoded(torch.randint(3, 400, (n,), generator=generator).tolist(), index % answers)
        for index, n in enumerate(counts)
    ]


SINGLE = [[10], [20]]
SEVERAL = [[10, 11, 12], [20], [10, 30]]


def plain_scores(model, examples, answers):
    """The definition: a forward pass for each pair, a log-softmax, a mean."""
    rows = []
    for example in examples:
        row = []
        for answer in answers:
            ids = torch.tensor([example.prompt + answer])
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(example.prompt) - 1
            picked = [log_probs[start + k, token].item() for k, token in enumerate(answer)]
            row.append(sum(picked) / len(picked))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def tolerance(scores):
    """Same mathematics, other order of float32 sums.

    The sums of the two-layer model have at most 400 terms (the vocabulary's exponentials; others
    have 16 to 64), rounding errors of which grow like their square root: 20 units in the last place
    of the largest number in sight, the largest score. Twice, for both sides of the comparison.
    """
    return {
        "rtol": 0.0,
        "atol": 2 * 20 * torch.finfo(torch.float32).eps * scores.abs().max().item(),
    }


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "bare"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", [SINGLE, SEVERAL], ids=["single", "several"])
@torch.no_grad()
def test_scores_are_mean_log_probabilities(kind, side, answers):
    model = Bare(tiny_model()) if kind == "bare" else tiny_model(kind)
    examples = example_batch()
    want = plain_scores(model, examples, answers)
    scorer = Scorer(model, answers, pad_id=1, padding_side=side)
    got = scorer.scores(scorer.batch(examples))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, **tolerance(want))


@pytest.mark.parametrize("loss", ["classification", "lm"])
@torch.no_grad()
def test_sharing_the_prompt_changes_nothing(loss):
    model = tiny_model()
    examples = example_batch()
    shared = Scorer(model, SINGLE, pad_id=1)
    apart = Scorer(model, SINGLE, pad_id=1, share_prompt=False)
    assert shared.shared
    assert not apart.shared
    a, b = shared.batch(examples), apart.batch(examples)
    assert (len(a.rows.positions), len(b.rows.positions)) == (4, 8)
    torch.testing.assert_close(shared.scores(a), apart.scores(b), **tolerance(shared.scores(a)))
    a, b = shared.batch(examples, loss), apart.batch(examples, loss)
    torch.testing.assert_close(
        shared.loss(a, loss), apart.loss(b, loss), **tolerance(shared.scores(a))
    )


@torch.no_grad()
def test_losses_are_what_they_say():
    model = tiny_model()
    examples = example_batch(answers=3)
    scores = plain_scores(model, examples, SEVERAL)
    labels = torch.tensor([example.label for example in examples])
    scorer = Scorer(model, SEVERAL, pad_id=1)
    got = scorer.loss(scorer.batch(examples))
    want = -scores.log_softmax(-1)[range(4), labels].mean()
    torch.testing.assert_close(got.double(), want, **tolerance(scores))
    lengths = torch.tensor([len(SEVERAL[label]) for label in labels])
    want = -(scores[range(4), labels] * lengths).sum() / lengths.sum()  # token mean
    batch = scorer.batch(examples, "lm")
    assert len(batch.rows.positions) == len(examples)  # right answers only
    got = scorer.loss(batch, "lm")
    torch.testing.assert_close(got.double(), want, **tolerance(scores))
    with pytest.raises(ValueError, match="right answers has no scores"):
        scorer.scores(batch)
    with pytest.raises(ValueError, match="needs a batch made with"):
        scorer.loss(scorer.batch(examples), "lm")


@pytest.mark.parametrize("loss", ["classification", "lm", "accuracy"])
@pytest.mark.parametrize("answers", [SINGLE, SEVERAL], ids=["single", "several"])
@torch.no_grad()
def test_a_batch_in_parts_has_the_loss_of_the_whole(loss, answers):
    """Parts of unequal size, and in "lm" of unequal tokens an example."""
    examples = example_batch((5, 9, 2, 9, 4), answers=len(answers))
    scorer = Scorer(tiny_model(), answers, pad_id=1)
    whole = scorer.batch(examples, loss)
    parts = [scorer.batch(examples[at : at + 2], loss) for at in range(0, 5, 2)]
    want = scorer.loss(whole, loss)
    # a mean of scores: their tolerance
    scores = scorer.scores(scorer.batch(examples))
    torch.testing.assert_close(scorer.mean_loss(parts, loss), want, **tolerance(scores))
    assert torch.equal(scorer.mean_loss([whole], loss), want)
    plain = sum(scorer.loss(part, loss) for part in parts) / 3
    assert abs(float(plain - want)) > 10 * tolerance(scores)["atol"]  # parts count differently


@torch.no_grad()
def test_the_accuracy_loss_is_the_negative_accuracy():
    scorer = Scorer(tiny_model(), SEVERAL, pad_id=1)
    examples = example_batch((3, 9, 4, 7, 5), answers=3)
    loss = scorer.loss(scorer.batch(examples, "accuracy"), "accuracy")
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-scorer.evaluate(examples, batch_size=2).accuracy)
    assert -1 < float(loss) < 0


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("answers", [SINGLE, SEVERAL], ids=["single", "several"])
@torch.no_grad()
def test_scores_of_a_model_with_an_adapter(kind, scheme, answers, tmp_path):
    pytest.importorskip("peft")
    tiny_model(kind).save_pretrained(tmp_path)
    model = load_adapted(str(tmp_path), "float32", torch.device("cpu"), scheme, seed=3)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name or "prompt_encoder" in name for name in trainable)
    for p in trainable.values():  # so that the adapter does something
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    examples = example_batch()
    shift = prepended_logits(model)
    assert shift == (10 if scheme == "prompt" else 0)
    want = []
    for example in examples:
        for answer in answers:
            logits = model(input_ids=torch.tensor([example.prompt + answer])).logits[0, shift:]
            log_probs = logits.double().log_softmax(-1)
            start = len(example.prompt) - 1
            picked = [log_probs[start + k, token].item() for k, token in enumerate(answer)]
            want.append(sum(picked) / len(picked))
    scorer = Scorer(model, answers, pad_id=1)
    got = scorer.scores(scorer.batch(examples)).double()
    want = torch.tensor(want, dtype=torch.float64).view_as(got)
    torch.testing.assert_close(got, want, **tolerance(want))
    bare = Scorer(tiny_model(kind), answers, pad_id=1)
    assert (bare.scores(bare.batch(examples)).double() - want).abs().max() > 1e-3
    taken = {"lora": 0, "prefix": 5, "prompt": 10}[scheme]
    assert maximum_length(model, byte_level_tokenizer(length=1000)) == 64 - taken


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_new_adapter_is_a_function_of_the_seed(scheme, tmp_path):
    pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path)

    def adapter(seed):
        model = load_adapted(str(tmp_path), "float32", torch.device("cpu"), scheme, seed)
        assert not model.training
        return [p.detach() for p in model.parameters() if p.requires_grad]

    state = torch.get_rng_state()
    first = adapter(0)
    torch.manual_seed(7)
    assert all(map(torch.equal, first, adapter(0)))
    assert not all(map(torch.equal, first, adapter(1)))
    torch.set_rng_state(state)
    adapter(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_loss_is_float32_whatever_the_dtype(dtype):
    model = tiny_model(dtype=dtype)
    examples = example_batch((5, 5))
    for answers in (SINGLE, SEVERAL):
        scorer = Scorer(model, answers, pad_id=1)
        loss = scorer.loss(scorer.batch(examples))
        assert loss.dtype == torch.float32
        # the logits are of the model's dtype; from there on float32: no second rounding
        assert loss != loss.to(dtype).float()


@torch.no_grad()
def test_only_the_needed_logits_are_computed():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    # answers of 3, 1 and 2 tokens, without their last ones behind their prompt, or each in a row
    for answers, share, width in ((SINGLE, True, 1), (SEVERAL, True, 4), (SEVERAL, False, 3)):
        scorer = Scorer(model, answers, pad_id=1, share_prompt=share)
        examples = example_batch((7, 7))
        scorer.scores(scorer.batch(examples))
        assert seen.pop() == width


def test_accuracy_counts_the_highest_scores():
    model = tiny_model()
    examples = example_batch((3, 9, 4, 7, 5), answers=3)
    with torch.no_grad():
        right = plain_scores(model, examples, SEVERAL).argmax(-1)
    want = sum(int(r) == e.label for r, e in zip(right, examples, strict=True)) / 5
    assert Scorer(model, SEVERAL, pad_id=1).evaluate(examples, batch_size=2).accuracy == want


def test_the_maximum_length_is_the_smaller_one():
    model = tiny_model()
    assert maximum_length(model, byte_level_tokenizer(length=1000)) == 64
    assert maximum_length(model, byte_level_tokenizer(length=50)) == 50


# ---- order, history, report ----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 16), (5, 5), (1, 3)])
def test_every_example_comes_once_an_epoch(size, batch_size):
    seen = [i for step in range(size) for i in batch_indices(size, batch_size, 3, step)]
    epochs = [seen[at : at + size] for at in range(0, len(seen), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_depends_on_seed_and_step_alone():
    forwards = [batch_indices(50, 8, 1, step) for step in range(20)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    backwards = [batch_indices(50, 8, 1, step) for step in reversed(range(20))]
    assert torch.equal(state, torch.get_rng_state())
    assert forwards == backwards[::-1]
    assert forwards != [batch_indices(50, 8, 2, step) for step in range(20)]


def test_history_survives_a_kill_and_drops_later_steps(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.add(step=0, dev_accuracy=0.5)
    history.add(step=1, loss=math.nan, projected_grad=math.nan, forwards=2, seconds=0.1)
    history.add(step=2, loss=0.5, projected_grad=1.0, forwards=2, seconds=0.1)
    history.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [json.loads(line) for line in path.read_text().splitlines()[:3]] == read_history(path)
    resumed = History(path, step=1)
    resumed.add(step=2, loss=0.25, projected_grad=1.0, forwards=2, seconds=0.1)
    resumed.close()
    assert resumed.losses() == [(1, None), (2, 0.25)]
    assert resumed.accuracies("dev") == [(0, 0.5)]
    assert read_history(path) == resumed.entries
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff", "not JSON ('utf-8' codec can't decode"),
        (b"{", "not JSON (Expecting"),
        (b"[1]", "not a line of a history"),
        (b'{"dev_accuracy": 0.5}', "not a line of a history"),
        (b'{"step": 2, "dev_accuracy": "0.5"}', "not a line of a history"),
        (b'{"step": 2, "loss": 0.5}', "not a line of a history"),
        (b'{"step": 2, "loss": 0.5, "projected_grad": 1, "forwards": "2", "seconds": 1}', "not a "),
    ],
)
def test_a_damaged_history_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 0, "dev_accuracy": 0.5}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        read_history(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_json_is_strict():
    assert to_json({"a": [math.inf, 1.5], "b": math.nan}) == '{"a": [null, 1.5], "b": null}'


def test_smoothing():
    assert smooth([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert smooth([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]


def test_summary_and_table(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.add(step=0, test_accuracy=0.5)
    history.add(step=1, loss=0.7, projected_grad=1.0, forwards=2, seconds=9.0)
    history.add(step=2, loss=math.inf, projected_grad=[1.0, math.nan], forwards=5, seconds=0.2)
    history.add(step=2, test_accuracy=0.9)
    history.close()
    timings = {"perturb": 0.05, "forward": 0.1, "update": 0.025}
    summary = summarize(history, timings, measured_steps=1, memory=2**21)
    assert summary["steps"] == 2
    assert summary["forwards"] == 7
    assert summary["skipped_steps"] == 1
    assert summary["accuracy"] == {"test": {"before": 0.5, "after": 0.9}}
    assert summary["seconds_per_step"] == {"total": 0.2, **timings}
    assert table(summary) == (
        "test accuracy   0.500 -> 0.900\n"
        "time per step     200.00 ms\n"
        "  perturb          50.00 ms\n"
        "  forward         100.00 ms\n"
        "  update           25.00 ms\n"
        "  other            25.00 ms\n"
        "peak memory     2 MiB\n"
        "steps           2\n"
        "  skipped       1 (loss not finite)\n"
        "forward passes  7"
    )
