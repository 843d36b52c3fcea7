"""Masked language models: templates with {mask}, their encoding, and whole runs."""

import json
import os
import signal

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file  # noqa: E402
from support import tiny_models  # noqa: E402
from support.tiny_models import roberta_tokenizer  # noqa: E402

from zo_fused.cli.main import main  # noqa: E402
from zo_fused.task.data import Example  # noqa: E402
from zo_fused.task.encoding import Encoded, maximum_length  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.masked import MaskEncoder, MaskScorer  # noqa: E402
from zo_fused.task.prompt import Task  # noqa: E402

WORDS = {"negative": "terrible", "positive": "great"}


def bert_tokenizer():
    """WordPiece: no spaces in tokens; what it doesn't know is [UNK]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", "great", "terrible"]
    words += ["a", "film", ".", "good", "##ish"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


# ---- templates -----------------------------------------------------------------------------------


def test_a_template_with_a_mask():
    task = Task("{text} It was {mask}.", WORDS)
    assert task.masked
    assert task.fields == ("text",)
    assert task.answers == (" terrible", " great")  # the template's space is the word's
    assert Task("{text} It was {mask}.", {"a": " bad", "b": " good"}).answers == (" bad", " good")
    assert Task("{mask}: {text}", WORDS).answers == ("terrible", "great")
    assert Task("{text} It was{mask}", {"a": " x", "b": " y"}).answers == (" x", " y")
    assert task.prompt({"text": "A film.", "mask": "no"}, "<mask>") == "A film. It was<mask>."
    assert task.without_words().template == "{text} {mask}"
    assert not Task("{text} It was", {"a": " x", "b": " y"}).masked


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} {mask} and {mask}", "has 2 masks, and an answer is one token in one {mask}"),
        ("It was {mask}", "no placeholder"),
        ("{text} was{mask}", "would read 'wasterrible' after the template"),
    ],
)
def test_a_bad_template_with_a_mask_is_refused(template, message):
    with pytest.raises(UserError) as error:
        Task(template, WORDS)
    assert message in str(error.value)


# ---- encoding ------------------------------------------------------------------------------------


def encoded(encoder, **fields):
    (made,) = encoder.encode([Example(fields, "positive", "x:1")])
    return encoder.tokenizer.convert_ids_to_tokens(made.prompt)


def test_a_mask_stands_where_the_word_would():
    """The tokens are those of the text with the word, but for the word."""
    for tokenizer, marks in ((roberta_tokenizer(), "<s> </s>"), (bert_tokenizer(), "[CLS] [SEP]")):
        encoder = MaskEncoder(Task("{text} It was {mask}.", WORDS), tokenizer, 64)
        (made,) = encoder.encode([Example({"text": "a film"}, "positive", "x:1")])
        whole = tokenizer("a film It was great.")["input_ids"]
        at = made.prompt.index(tokenizer.mask_token_id)
        assert made.prompt[:at] + encoder.answers[1] + made.prompt[at + 1 :] == whole
        ends = tokenizer.convert_ids_to_tokens([made.prompt[0], made.prompt[-1]])
        assert ends == marks.split()


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{a} It was {mask}.", "<s> 3 4 5 6 7 8 9 ĠIt Ġwas <mask> . </s>"),
        ("{mask}: {a}", "<s> <mask> : Ġ 0 1 2 3 4 5 6 7 </s>"),
        ("{a}?{mask},{a}", "<s> 6 7 8 9 ? <mask> , 0 1 2 3 </s>"),
        ("{a}?{mask},{b}", "<s> 4 5 6 7 8 9 ? <mask> , 0 1 </s>"),
        ("{b}?{mask},{a}", "<s> 0 1 ? <mask> , 0 1 2 3 4 5 </s>"),
    ],
)
def test_what_is_farthest_from_the_mask_is_cut(template, shown):
    words = {"negative": " terrible", "positive": " great"}
    encoder = MaskEncoder(Task(template, words), roberta_tokenizer(), 13)
    assert encoded(encoder, a="0123456789", b="01") == shown.split()
    assert encoder.cut == 1
    assert "<mask>" in encoded(encoder, a="", b="01")
    assert encoder.cut == 1  # this one is whole


def test_masked_encoding_errors():
    def encoder(template, tokenizer, *answers):
        return MaskEncoder(Task(template, dict(zip("ab", answers, strict=True))), tokenizer, 64)

    for word in ("goodish", "splendid"):  # of two pieces; unknown
        with pytest.raises(UserError, match=rf"' {word}' must be one token, .*; take another word"):
            encoder("{text} {mask}", bert_tokenizer(), "great", word)
    plain = roberta_tokenizer()
    plain.mask_token = None
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        encoder("{text} {mask}", plain, "great", "terrible")
    with pytest.raises(UserError, match="; with a space before it, ' terrible', it is one token"):
        encoder("{mask}: {text}", roberta_tokenizer(), " great", "terrible")
    made = encoder("{text} {mask}", roberta_tokenizer(), "great", "terrible")
    with pytest.raises(UserError, match="x:7: the text holds '<mask>', the mask token itself"):
        made.encode([Example({"text": "a <mask>"}, "a", "x:7")])


# ---- scores --------------------------------------------------------------------------------------


@torch.no_grad()
def test_only_the_logits_of_masks_are_computed():
    model = tiny_models.masked_model("roberta")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    scorer = MaskScorer(model, [[10], [20]], pad_id=0, mask_id=99)
    scorer.scores(scorer.batch([Encoded([7, 8, 99], 0), Encoded([99, 7, 8, 9, 11], 1)]))
    assert seen == [1]
    ids = torch.tensor([[7, 8, 99]])
    assert model(input_ids=ids).logits.shape[1] == 3  # afterwards all are there again


def test_robertas_positions_start_after_that_of_padding():
    model = tiny_models.masked_model("roberta")  # 64 positions, padding has number 0
    assert maximum_length(model, roberta_tokenizer(length=1000)) == 63
    assert maximum_length(tiny_models.masked_model("bert"), roberta_tokenizer(length=1000)) == 64
    ids = torch.full((1, 63), 9)
    assert torch.isfinite(model(input_ids=ids).logits).all()


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of a tiny RoBERTa and a tiny BERT."""
    made = {}
    for kind, tokenizer in (("roberta", roberta_tokenizer()), ("bert", bert_tokenizer())):
        made[kind] = tmp_path_factory.mktemp(kind)
        tokenizer.save_pretrained(made[kind])
        size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = tiny_models.config(kind, **size)
        tiny_models.random_model(transformers.AutoModelForMaskedLM, config).save_pretrained(
            made[kind]
        )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    texts = {"negative": ["it was a film", "a"], "positive": ["good film . " * 30, "a good film"]}
    lines = [json.dumps({"text": t, "label": label}) for label in texts for t in texts[label] * 2]
    for split in ("train", "dev"):
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    task = {"template": "{text} It was {mask}.", "verbalizer": WORDS}
    (directory / "task.json").write_text(json.dumps(task))
    return directory


def arguments(base, data, output, *more):
    words = f"finetune --model {base} --train {data} --output {output} --device cpu --steps 4"
    return [*words.split(), "--batch-size", "3", "--eval-steps", "2", "--lr", "1e-3", *more]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("roberta", ("--method", "lozo", "--interval", "2")),
        ("bert", ("--method", "lozo", "--schedule", "paired")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("roberta", ("--method", "mezo", "--loss", "accuracy")),
                ("roberta", ("--peft", "lora", "--method", "mezo")),
                ("bert", ("--method", "forward-grad", "--loss", "lm")),
                ("bert", ("--method", "mezo-m", "--dtype", "bfloat16", "--no-template")),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_masked_model_is_tuned_resumed_and_replayed(
    bases, data, tmp_path, monkeypatch, capsys, kind, more
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(bases[kind], data, whole, *more)) == 0
    with monkeypatch.context() as patch:
        original, calls = MaskScorer.loss, []

        def loss(scorer, batch, kind="classification"):
            calls.append(0)
            if len(calls) == (3 if {"forward-grad", "paired"} & set(more) else 5):
                os.kill(os.getpid(), signal.SIGINT)
            return original(scorer, batch, kind)

        patch.setattr(MaskScorer, "loss", loss)
        assert main(arguments(bases[kind], data, out, *more)) == 130
    assert main(arguments(bases[kind], data, out, *more, "--resume")) == 0
    if not {"accuracy", "--peft"} & set(more):
        tuned, start = (load_file(at / "model.safetensors") for at in (out, bases[kind]))
        assert any(not torch.equal(tuned[n], start[n].to(tuned[n].dtype)) for n in start)
    capsys.readouterr()
    replay = ["replay", "--model", str(bases[kind]), "--log", str(out / "replay.jsonl")]
    adapter = ["--peft", "lora"] if "--peft" in more else []
    assert main([*replay, *adapter, "--verify", str(out)]) == 0
    assert "equal: all" in capsys.readouterr().out


def test_a_masked_model_learns(bases, data, tmp_path):
    """Forward passes alone bring the loss down, on four texts that a tiny model can tell apart."""
    words = ("--method", "mezo", "--steps", "150", "--batch-size", "8", "--lr", "1e-3")
    assert main(arguments(bases["roberta"], data, tmp_path / "out", *words)) == 0
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


CAUSAL_TASK = ["--template", "{text} It was", "--verbalizer", "negative= terrible"]
CAUSAL_TASK += ["positive= great"]


def test_template_and_model_must_fit(bases, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(bases["roberta"], data, out, *CAUSAL_TASK)) == 2
    error = capsys.readouterr().err
    assert "is a masked language model (roberta): say in the template where" in error
    assert "as in '{text} It was {mask}.'" in error
    causal = tmp_path / "causal"
    roberta_tokenizer().save_pretrained(causal)
    tiny_models.causal_model("llama", vocab_size=320).save_pretrained(causal)
    assert main(arguments(causal, data, out)) == 2
    assert "is a causal language model (llama), which goes on from where" in capsys.readouterr().err
    assert main(arguments(bases["roberta"], data, out, "--peft", "prefix")) == 2
    assert "which peft gives no prefix adapter; take --peft lora" in capsys.readouterr().err
    transformers.T5Config().save_pretrained(causal)
    assert main(arguments(causal, data, out)) == 2
    assert "t5 models have an encoder and a decoder" in capsys.readouterr().err


def test_an_encoder_without_its_head_is_refused(bases, data, tmp_path, capsys):
    """As sentence encoders are saved: transformers would make up the head."""
    base = tmp_path / "encoder"
    model = transformers.AutoModel.from_pretrained(bases["bert"])
    model.save_pretrained(base)
    bert_tokenizer().save_pretrained(base)
    assert main(arguments(base, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "lacks weights of the language model: cls.predictions." in error
    assert " more\n" in error
