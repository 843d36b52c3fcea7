"""Loading models: what is incomplete, damaged, dangerous or of a kind that needs help."""

import json
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from support import tiny_models  # noqa: E402

from zo_fused.cli.main import main  # noqa: E402
from zo_fused.task.adapters import load_adapted  # noqa: E402
from zo_fused.task.encoding import Encoded  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.models import load_config, load_model, load_tokenizer  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path):
    """A directory of a tiny Llama, without a tokenizer."""
    tiny_models.causal_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def load(directory, **more):
    return load_model(str(directory), "float32", CPU, **more)


def change(directory, edit):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused(llama, capfd):
    change(llama, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    message = (
        r"llama' lacks weights of the language model: model\.layers\.0\.mlp\.down_proj\.weight$"
    )
    capfd.readouterr()
    with pytest.raises(UserError, match=message):
        load(llama)
    assert capfd.readouterr() == ("", "")  # not the report of transformers, too
    change(llama, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"down_proj\.weight and 1 more$"):
        load(llama)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gemma3_text", "bloom", "mamba"])
def test_tied_weights_are_not_missing(kind, tmp_path):
    tiny_models.causal_model(kind).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)


def test_sizes_that_do_not_fit_are_named(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    change(llama, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(UserError, match=r"config.json: .*up_proj.weight has shape \(3, 5\), not"):
        load(llama)


def cut(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(directory):
    (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": json.loads}, directory / "pytorch_model.bin")


def noise(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and so on")


def bad_config(directory):
    (directory / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "a file of weights is damaged or cut short"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "is damaged or cut short"),
        (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
        (pickled, "holds more than tensors, so loading it could run code; ask for one in the"),
        (noise, "failed reading zip archive"),
        (bad_config, "Field 'hidden_size' expected int, got str"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda d: (d / "config.json").write_text("[]"), "Should have a `model_type` key"),
    ],
)
def test_damaged_files_are_told_in_a_sentence(llama, harm, message):
    harm(llama)
    with pytest.raises(UserError) as error:
        load(llama)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_directory_without_a_tokenizer(tmp_path, kind):
    """For some kinds transformers makes an empty one."""
    tiny_models.config(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't load the tokenizer of "):
        load_tokenizer(str(tmp_path))


# ---- code of a model's own -----------------------------------------------------------------------


@pytest.fixture
def own_code(llama, monkeypatch, tmp_path):
    """A directory of a model whose code is in it."""
    settings = json.loads((llama / "config.json").read_text())
    settings["model_type"] = "own_llama"
    settings["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (llama / "config.json").write_text(json.dumps(settings))
    (llama / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig): model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM): config_class = Own\n"
    )
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return llama


def test_own_code_is_not_run_unasked(own_code, monkeypatch, tmp_path):
    def ask(*words):
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", ask)
    (own_code / "own.py").write_text("raise AssertionError('it ran')\n")
    for function in (load, lambda d: load_config(str(d))):
        with pytest.raises(UserError, match=r"not run unasked; .* add --trust-remote-code if you"):
            function(own_code)


@pytest.mark.filterwarnings("ignore")  # of transformers, about code it has fetched
def test_own_code_runs_if_it_is_trusted(own_code):
    model = load(own_code, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    scorer = Scorer(model, [[10], [20]], pad_id=0)
    assert scorer.padding_side == "right"  # nothing is known of its positions
    scorer.check([Encoded([7, 8, 9], 0)])


def test_the_command_line_has_the_option(own_code, tmp_path, capsys):
    words = f"finetune --model {own_code} --train {tmp_path}/x.jsonl --output {tmp_path}/out"
    task = ["--template", "{text} It was", "--verbalizer", "a= b", "c= d"]
    (tmp_path / "x.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "c"}')
    assert main([*words.split(), *task]) == 2
    assert "add --trust-remote-code if you trust it" in capsys.readouterr().err
    assert main([*words.split(), *task, "--trust-remote-code"]) == 2
    assert "there is no tokenizer.json" in capsys.readouterr().err  # it got further


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about their own models
@pytest.mark.parametrize("kind", ["olmo2", "mamba", "mixtral", "phimoe", "bamba", "xlm-roberta-xl"])
def test_lora_fits_every_architecture(kind, tmp_path):
    """Not known to peft; kernels that read a weight; experts; a router that is a Linear; masks."""
    pytest.importorskip("peft")
    masked = kind == "xlm-roberta-xl"
    make = tiny_models.masked_model if masked else tiny_models.causal_model
    make(kind).save_pretrained(tmp_path)
    model = load_adapted(str(tmp_path), "float32", CPU, "lora", 0)
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert tuned
    assert all("lora_" in name for name in tuned)
    ids = torch.randint(7, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1
    assert not torch.allclose(model(input_ids=ids).logits, before)


# ---- pads and tokens -----------------------------------------------------------------------------


def test_tokens_without_an_embedding_are_refused():
    scorer = Scorer(tiny_models.causal_model("llama"), [[10], [20]], pad_id=0)
    with pytest.raises(
        UserError, match="makes the token 128, and the model has embeddings for 128"
    ):
        scorer.check([Encoded([5, 128], 0)])
    scorer.check([Encoded([5, 127], 0)])


def test_a_pad_token_beyond_the_embeddings_is_not_used():
    """Many tokenizers get a pad token that the model has no row for."""
    from zo_fused.task.preparing import make_scorer

    class Tokenizer:
        pad_token_id = 128
        eos_token_id = None

    class Made:
        answers = ((10,), (20,))
        task = None

    model = tiny_models.causal_model("llama")
    assert make_scorer(model, Tokenizer(), Made()).pad_id == 0
    Tokenizer.eos_token_id = 5
    scorer = make_scorer(model, Tokenizer(), Made())
    assert scorer.pad_id == 5
    examples = [Encoded([5, 5, 9], 0), Encoded([5, 7, 5, 9, 5, 5], 1)]  # as real tokens, too
    with torch.no_grad():
        together = scorer.scores(scorer.batch(examples))
        alone = torch.cat([scorer.scores(scorer.batch([example])) for example in examples])
    # two orders of the same float32 sums, of numbers of the size of ten
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


# ---- methods that not every operator bears ------------------------------------------------------


@pytest.fixture
def tune(tmp_path):
    """Runs two steps on a tiny model of a kind; the exit code."""
    pytest.importorskip("matplotlib")
    lines = [
        json.dumps({"text": text, "label": label}) for text, label in (("a", "0"), ("b c", "1"))
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))

    def run(kind, *more):
        tokenizer = tiny_models.roberta_tokenizer()
        tokenizer.save_pretrained(tmp_path / kind)
        size = {"vocab_size": len(tokenizer)}
        tiny_models.causal_model(kind, **size).save_pretrained(tmp_path / kind)
        words = f"finetune --model {tmp_path / kind} --train {tmp_path}/x.jsonl --steps 2"
        task = ["--template", "{text} It was", "--verbalizer", "0= terrible", "1= great"]
        output = ["--output", str(tmp_path / "out"), "--device", "cpu"]
        return main([*words.split(), *task, *output, *more])

    return run


REFUSALS = {
    "forward-grad": "--method forward-grad is not for this model; take --method mezo (ForwardGrad:",
    "paired": "--schedule paired is not for this model; take --schedule factored (paired=True",
}


@pytest.mark.filterwarnings("ignore")  # of transformers and torch, about their own code
@pytest.mark.parametrize(
    "more", [("--method", "forward-grad"), ("--method", "lozo", "--schedule", "paired")]
)
def test_experts_are_loaded_as_the_method_bears_them(tune, capsys, more):
    assert tune("qwen3_moe", *more) == 0
    assert tune("bloom", *more, "--overwrite") == 2  # it has a function of its own, in any case
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"zo-fused: {REFUSALS[more[-1]]}" in error
