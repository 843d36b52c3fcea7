"""Examples with candidates of their own, answers that the model writes, and draws of examples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from support import tiny_models  # noqa: E402
from support.tiny_models import opt_tokenizer  # noqa: E402

from zo_fused.task import answers  # noqa: E402
from zo_fused.task.adapters import SCHEMES, load_adapted  # noqa: E402
from zo_fused.task.data import Example  # noqa: E402
from zo_fused.task.encoding import Encoded, Encoder  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.generating import GenerationScorer  # noqa: E402
from zo_fused.task.generation import greedy  # noqa: E402
from zo_fused.task.prompt import Question  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402
from zo_fused.task.splits import Draw, drawn, shuffled  # noqa: E402

# Scores of the size of 10, float32 sums of some hundred terms in another order: as derived and
# measured in test_architectures.py.
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}

OWN = [
    Encoded([7, 8, 9], 1, ([10, 11], [12])),
    Encoded([7, 8, 9, 20, 21, 22, 23], 2, ([13], [14, 15, 16], [17, 18], [19, 30]), right=(2, 0)),
    Encoded([7], 0, ([31, 32, 33], [34], [35])),
]
APART = [Encoded([7, 8], 1, ([10, 11],) * 2, prompts=([7, 8], [7, 9, 8]))]


def score(model, prompt, answer):
    log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return [log_probs[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)]


def scores_of(model, example):
    prompts = example.prompts or [example.prompt] * len(example.answers)
    means = [score(model, p, a) for p, a in zip(prompts, example.answers, strict=True)]
    return torch.tensor([sum(s) / len(s) for s in means], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("examples", [OWN, APART, OWN + APART], ids=["own", "apart", "both"])
@torch.no_grad()
def test_scores_of_candidates_of_an_examples_own(kind, examples):
    model = tiny_models.causal_model(kind)
    scorer = Scorer(model, [], pad_id=0)
    scorer.check(examples)
    batch = scorer.batch(examples)
    got = scorer.scores(batch).double()
    want = [scores_of(model, example) for example in examples]
    for row, scores in zip(got, want, strict=True):
        torch.testing.assert_close(row[: len(scores)], scores, **TOLERANCE)
        assert (row[len(scores) :] == -math.inf).all()
    picked = [int(scores.argmax()) for scores in want]
    right = [p in (e.right or (e.label,)) for p, e in zip(picked, examples, strict=True)]
    assert scorer.hits(batch, got).tolist() == right
    rows = len(batch.rows.inputs["input_ids"])
    assert rows == (3 if kind != "bloom" and examples is OWN else sum(map(len, want)))


@torch.no_grad()
def test_losses_of_candidates_of_an_examples_own():
    model = tiny_models.causal_model("llama")
    scorer = Scorer(model, [], pad_id=0)
    examples = OWN + APART
    want = [scores_of(model, example) for example in examples]
    right = [scores.log_softmax(-1)[e.label] for scores, e in zip(want, examples, strict=True)]
    loss = scorer.loss(scorer.batch(examples)).double()
    torch.testing.assert_close(loss, -sum(right) / 4, **TOLERANCE)
    prompts = [e.prompts[e.label] if e.prompts else e.prompt for e in examples]
    likely = [score(model, p, e.answers[e.label]) for p, e in zip(prompts, examples, strict=True)]
    loss = scorer.loss(scorer.batch(examples, "lm"), "lm").double()
    tokens = torch.tensor([x for part in likely for x in part], dtype=torch.float64)
    torch.testing.assert_close(loss, -tokens.mean(), **TOLERANCE)
    quality = scorer.evaluate(examples, batch_size=5)  # in three parts
    torch.testing.assert_close(quality.loss, -float(sum(right)) / 4, **TOLERANCE)
    batch = scorer.batch(examples, "accuracy")
    assert quality.accuracy == -scorer.loss(batch, "accuracy").item()
    assert [len(part) for part in scorer._parts(examples, 5)] == [2, 1, 1]


@torch.no_grad()
def test_all_right_answers_count():
    """The prediction of an example is made right by saying that it is."""
    scorer = Scorer(tiny_models.causal_model("llama"), [], pad_id=0)
    picked = int(scorer.scores(scorer.batch(OWN[:1])).argmax())
    other = replace(OWN[0], label=1 - picked)
    assert scorer.evaluate([other], 4).accuracy == 0
    assert scorer.evaluate([replace(other, right=(1 - picked, picked))], 4).accuracy == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_row_of_several_answers_in_16_bits(dtype):
    """The mask is of the model's dtype. Another order of sums: a few roundings of logits of 10."""
    model = tiny_models.causal_model("llama").to(dtype)
    packed, apart = (Scorer(model, [], 0, share_prompt=share) for share in (True, False))
    assert packed.packed
    assert not apart.packed
    finite = torch.isfinite(packed.scores(packed.batch(OWN)))
    difference = packed.scores(packed.batch(OWN)) - apart.scores(apart.batch(OWN))
    assert difference[finite].abs().max() < 4 * 10 * torch.finfo(dtype).eps


class Own:
    """A task whose examples say themselves what is asked."""

    answers, masked, max_new_tokens = (), False, 0

    def question(self, example, mask=""):
        return example.question


def test_encoding_of_candidates_of_an_examples_own():
    tokenizer = opt_tokenizer([" great good It was film"] * 9, 400)
    encoder = Encoder(Own(), tokenizer, 12)

    def encode(*question):
        return encoder.encode([Example({}, "0", "x:1", Question(*question))])[0]

    made = encode(("It was",), (" great", " good film"), (1, 0))
    assert [tokenizer.decode(ids) for ids in made.answers] == [" great", " good film"]
    assert (made.label, made.right, made.prompts) == (1, (1, 0), ())
    assert tokenizer.decode(made.prompt) == "</s>It was"
    made = encode(("It was", "A film was"), (" great", " great"), (0,))
    assert [tokenizer.decode(ids) for ids in made.prompts] == ["</s>It was", "</s>A film was"]
    assert made.right == ()
    assert encoder.cut == 0
    made = encode((" film" * 20,), (" great", " good film good"), (0,))
    assert (len(made.prompt), encoder.cut) == (12 - 3, 1)  # room for the longest of its own
    made = encode((" film" * 20,), (" great", " good"), (0,))
    assert len(made.prompt) == 12 - 1
    with pytest.raises(UserError, match="no tokens of the answer ''"):
        encode(("It was",), ("", " good"), (0,))
    with pytest.raises(UserError, match="no room for a prompt: there are 12 tokens for both"):
        encode(("It was",), (" good" * 11, " great"), (0,))
    encoder.task.max_new_tokens = 7
    assert len(encode((" film" * 20,), (" great",), (0,), ("great",)).prompt) == 12 - 7


# ---- answers that the model writes ---------------------------------------------------------------


def test_scores_of_texts():
    """By hand, from the definitions."""
    assert answers.normal("The  cat's, a MAT.") == ["cats", "mat"]
    assert answers.exact_match("in 1858", ["1858", "In the 1858."]) == 1
    assert answers.exact_match("in 1859", ["1858"]) == 0
    assert answers.f1("the old mill", ["old mill"]) == 1
    assert answers.f1("old red mill", ["mill", "red barn"]) == pytest.approx(0.5)  # 2 1/3 1 / (4/3)
    assert answers.f1("a a b b", ["b b b c"]) == pytest.approx(2 * 2 / (2 + 4))  # articles go
    assert answers.f1("", ["the"]) == 0
    assert answers.f1("x", ["y", "x"]) == 1


TOKENIZER = opt_tokenizer(["one two three four five\n"] * 9, 300)
# letters and bytes of the tokenizer, so that what a random model writes is text
PROMPTS = [[40, 41, 42], [50, 51], [60, 61, 62, 63, 64, 65]]


@pytest.fixture(scope="module", params=["opt", "llama", "mistral", "bloom", "mamba"])
def writer(request):
    model = tiny_models.causal_model(request.param, vocab_size=300)
    return GenerationScorer(model, TOKENIZER, pad_id=0, stops=["\n"], max_new_tokens=9)


@torch.no_grad()
def test_what_is_written_is_what_is_most_likely(writer):
    """With a cache of what was read, where there is one, as from the definition."""
    assert writer.caches == (writer.model.config.model_type in ("opt", "llama", "mistral"))
    want = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 9:
            ids.append(int(writer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        want.append(ids[len(prompt) :])
    texts = [TOKENIZER.decode(ids).split("</s>")[0].split("\n")[0].strip() for ids in want]
    assert writer.write(PROMPTS) == texts
    assert any(texts)
    if writer.caches:
        writer.stops = ()
        assert writer._with_cache(PROMPTS) == want
        writer.stops = ("\n",)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_what_a_model_with_an_adapter_writes(scheme, tmp_path):
    pytest.importorskip("peft")
    tiny_models.causal_model("opt", vocab_size=300).save_pretrained(tmp_path)
    model = load_adapted(str(tmp_path), "float32", torch.device("cpu"), scheme, seed=3)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    writer = GenerationScorer(model, TOKENIZER, pad_id=0, stops=["\n"], max_new_tokens=6)
    assert writer.caches == (scheme == "lora")
    want = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        want.append(writer._cut(writer._text(ids[len(prompt) :])).strip())
    assert writer.write(PROMPTS) == want
    assert any(want)


@torch.no_grad()
def test_writing_ends_at_stops_and_at_eos(writer):
    end = TOKENIZER("\n", add_special_tokens=False)["input_ids"]
    word = TOKENIZER("z", add_special_tokens=False)["input_ids"]
    assert len(end) == len(word) == 1
    for last in (TOKENIZER.eos_token_id, end[0]):
        tokens = dict.fromkeys(range(5), word[0])

        def pick(texts, tokens=tokens, last=last):
            return [tokens.get(len(text), last) for text in texts]

        made = greedy([[5], [6, 7]], 50, pick, writer._ended)
        # until the shorter text has ended, too
        assert made == [word * 4 + [last], word * 3 + [last] * 2]
        assert [writer._cut(writer._text(ids)) for ids in made] == ["zzzz", "zzz"]


@torch.no_grad()
def test_losses_and_evaluation_of_written_answers(writer):
    texts = writer.write(PROMPTS)
    examples = [
        Encoded(prompt, 0, ([90, 91 + i],), texts=(text if i else "none of it", "x"))
        for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    writer.check(examples)
    right = [[text if i else "none of it", "x"] for i, text in enumerate(texts)]
    for kind, measure in (("f1", answers.f1), ("exact-match", answers.exact_match)):
        want = sum(measure(t, r) for t, r in zip(texts, right, strict=True)) / 3
        loss = writer.loss(writer.batch(examples, kind), kind)
        assert float(loss) == pytest.approx(-want)
        if kind == "f1":
            parts = [writer.batch(examples[:1], kind), writer.batch(examples[1:], kind)]
            assert float(writer.mean_loss(parts, kind)) == pytest.approx(-want)
    quality = writer.evaluate(examples, batch_size=2)
    assert quality.accuracy == pytest.approx(want)
    tokens = [x for e in examples for x in score(writer.model, e.prompt, e.answers[0])]
    assert quality.loss == pytest.approx(-sum(tokens) / len(tokens), abs=2e-5)
    assert quality.loss == pytest.approx(
        float(writer.loss(writer.batch(examples, "lm"), "lm")), abs=2e-5
    )
    with pytest.raises(ValueError, match='no candidates for the loss "classification"'):
        writer.batch(examples, "classification")


# ---- which examples ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, 100])
def test_shuffles_are_those_of_the_papers_codes(seed):
    """`np.random.shuffle` of a list, `permutation`, and pandas' `sample` after `np.random.seed`."""
    np.random.seed(seed)
    lines = [f"line {i}" for i in range(999)]
    np.random.shuffle(lines)
    assert [f"line {i}" for i in shuffled(999, seed)] == lines
    pandas = pytest.importorskip("pandas")
    sampled = pandas.DataFrame({"x": range(999)}).sample(n=300, random_state=seed)
    assert sampled["x"].tolist() == shuffled(999, seed)[:300]


def test_shuffles_do_not_change():
    """NumPy has frozen them; a run of years ago had these examples."""
    assert shuffled(10, 0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert shuffled(10, 42) == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]


def no_label(i):
    raise AssertionError("only a k-shot draw asks for labels")


def test_draws_of_so_many():
    """MeZO with OPT: dev is the end of what is drawn from the training set."""
    order = shuffled(30, 7)
    made = drawn({"train": 30, "test": 9}, Draw(12, 5, 4, None, 7), no_label)
    assert made["train"] == [("train", i) for i in order[:12]]
    assert made["dev"] == [("train", i) for i in order[12:17]]
    assert made["test"] == [("test", i) for i in shuffled(9, 7)[:4]]
    made = drawn({"train": 30, "test": 9}, Draw(1000, 5, 1000, None, 7), no_label)  # as CB has 250
    assert made["train"] == [("train", i) for i in order[:25]]
    assert made["dev"] == [("train", i) for i in order[25:]]
    assert len(made["test"]) == 9
    made = drawn({"train": 30, "dev": 8}, Draw(12, 5, None, None, 7), no_label)
    assert made["dev"] == [("dev", i) for i in shuffled(8, 7)[:5]]
    assert drawn({"train": 3, "dev": 2}, Draw(seed=7), no_label) == {
        "train": [("train", 0), ("train", 1), ("train", 2)],
        "dev": [("dev", 0), ("dev", 1)],
    }
    with pytest.raises(UserError, match="has 5 examples, of which --dev-examples 5 leaves none"):
        drawn({"train": 5}, Draw(None, 5), no_label)


def test_draws_of_so_many_of_each_class(capsys):
    """MeZO with RoBERTa: the first k of each class, then k more, in a shuffled training set."""
    labels = ["a", "b", "b"] * 10 + ["c"] * 3
    made = drawn({"train": 33, "test": 2000}, Draw(None, None, 1000, 2, 13), labels.__getitem__)
    order = shuffled(33, 13)
    for split, first in (("train", 0), ("dev", 2)):
        for label in "abc":
            of_label = [("train", i) for i in order if labels[i] == label][first : first + 2]
            assert [p for p in made[split] if labels[p[1]] == label] == of_label
    assert not set(made["train"]) & set(made["dev"])
    assert made["test"] == [("test", i) for i in shuffled(2000, 42)[:1000]]  # whatever the seed
    told = "the class 'c' has 3 examples: 2 are for train, 1 for dev, instead of 2 each"
    assert capsys.readouterr().err.count("warning") == 1
    drawn({"train": 33}, Draw(k=2, seed=1), labels.__getitem__)
    assert told in capsys.readouterr().err
