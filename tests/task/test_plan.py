"""``zo-fused plan``: sizes from a configuration against those of real models and steps."""

import gc
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from support import tiny_models  # noqa: E402

from zo_fused.cli import defaults, plan  # noqa: E402
from zo_fused.cli.main import main  # noqa: E402
from zo_fused.cli.method_options import by_method  # noqa: E402
from zo_fused.directions.factors import Factors  # noqa: E402
from zo_fused.task import memory  # noqa: E402
from zo_fused.task.encoding import Encoded  # noqa: E402
from zo_fused.task.memory import Live, Outline, kept  # noqa: E402
from zo_fused.task.models import load_config  # noqa: E402
from zo_fused.task.optimizers import make_optimizer  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples" / "plan"


def hyper(method, more):
    table = defaults.defaults(method, embedded=False)
    return {key: value for key, value in table.items() if key in by_method()[method]} | more


def measured(model, method, settings, batch, length):
    """Bytes of the state, of all that is held after three steps, and at most within one."""
    scorer = Scorer(model, [[0], [1]], pad_id=0)
    examples = [Encoded([7] * length, 0)] * batch
    made = scorer.batch(examples)
    gc.freeze()  # only what is made here is looked through
    with Live((*model.parameters(), *model.buffers())) as live:
        optimizer = make_optimizer(method, settings, model)
        numbers = itertools.count()  # losses that are all equal may skip a step
        for _ in range(3):
            optimizer.step(lambda: scorer.loss(made) + next(numbers))
        gc.collect()
    gc.unfreeze()
    of_parameters = [s for key, s in optimizer.state.items() if isinstance(key, torch.Tensor)]
    tensors = [t for s in of_parameters for t in s.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors), live.now, live.peak


def methods_of_models():
    """Every method with one model, and in turn with others: bf16, or experts."""
    others = itertools.cycle([("llama", torch.bfloat16), ("mixtral", torch.float32)])
    slow = pytest.mark.slow
    for number, case in enumerate(plan.cases()):
        marks = () if number % 10 == 8 else slow
        yield pytest.param("opt", torch.float32, case, id=f"{case[0]}-opt", marks=marks)
        other, dtype = next(others)
        yield pytest.param(other, dtype, case, id=f"{case[0]}-{other}", marks=slow)


@pytest.mark.parametrize(("kind", "dtype", "case"), list(methods_of_models()))
def test_state_and_what_is_kept_beside_the_weights(kind, dtype, case):
    """Tied weights and vectors; grouped heads in 16 bits; experts in three dimensions."""
    _, method, more = case
    model = tiny_models.causal_model(kind).to(dtype)
    if kind == "mixtral":
        model.set_experts_implementation("batched_mm" if "paired" in case[0] else "eager")
    settings = hyper(method, more)
    outline = Outline(model.config, dtype)
    want = kept(
        lambda module, **rank: make_optimizer(method, settings | rank, module),
        outline.shapes(),
        dtype,
        outline.linear(),
    )
    state, beside, _ = measured(model, method, settings, batch=2, length=4)
    assert want.state == state
    # a few numbers are the optimizer's, some of them with a row a query, and it keeps up
    # to 32 vectors of a step's numbers with a row a parameter (`Bucket.constant`), as many as there
    # were: one after another at random places
    rows = sum(1 for _ in model.parameters()) if "onservative" in case[0] else 0
    # the coefficients of the last sweep may still be there, a number a direction a row
    directions = {"FZOO": 9, "ES": 31}.get(case[0], 0)
    table = 4 * directions * sum(1 for _ in model.parameters())
    few = 128 + 3 * 8 * settings.get("queries", 1)
    few += 2 * 12 * (settings.get("history") or 0)  # powers of both betas, in both precisions
    assert want.beside == pytest.approx(beside, abs=few + 32 * 8 * rows + table)


SMALL = {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 2000}


@pytest.mark.parametrize("kind", ["llama", "opt", "roberta"])
def test_activations_are_those_that_are_alive(kind):
    sizes = SMALL if kind != "opt" else {"hidden_size": 128, "word_embed_proj_dim": 128}
    config = tiny_models.config(kind, **sizes)
    outline = Outline(config, torch.float32)
    if kind == "roberta":
        from zo_fused.task.masked import MaskScorer

        model = tiny_models.random_model(transformers.AutoModelForMaskedLM, config)
        scorer = MaskScorer(model, [[0], [1]], pad_id=0, mask_id=1)
    else:
        model = tiny_models.random_model(transformers.AutoModelForCausalLM, config)
        scorer = Scorer(model, [[0], [1]], pad_id=0)
    for backward in (False, True):
        with (
            Live((*model.parameters(), *model.buffers())) as live,
            torch.set_grad_enabled(backward),
        ):
            loss = scorer.loss(scorer.batch([Encoded([1] * 48, 0)] * 8))
        # the same operators, but for those that look at values, and attention's own numbers
        want = pytest.approx(live.peak, rel=0.05)
        assert outline.activations(8, 48, backward) == want
        del loss


@pytest.mark.parametrize("name", ["MeZO", "LOZO, factored", "ZO-Adam", "Forward-Grad"])
def test_the_peak_of_a_step(name, tmp_path, capsys):
    tiny_models.config("llama", **SMALL).save_pretrained(tmp_path)
    _, method, more = next(case for case in plan.cases() if case[0] == name)
    words = ["plan", "--model", str(tmp_path), "--dtype", "float32", "--json", "--method", method]
    assert main([*words, "--batch-size", "8", "--length", "48"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(row for row in found["methods"] if row["method"] == name)
    model = tiny_models.causal_model("llama", **SMALL)
    _, _, peak = measured(model, method, hyper(method, more), batch=8, length=48)
    # an estimate: what a step needs for a moment besides (sums of factors, tangents of sums)
    assert row["peak"] - found["weights"]["float32"] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    "name", ["SubZero+", "SeeZO", "AGZO", pytest.param("P-GAP", marks=pytest.mark.slow)]
)
def test_what_is_held_by_large_matrices_is_found_from_small_ones(name):
    """The ranks are others than those tried, and the rows and columns ten times as many."""
    _, method, more = next(case for case in plan.cases() if case[0] == name)
    settings = hyper(method, more)

    def make(module, **rank):
        return make_optimizer(method, settings | rank, module)

    shape, count, together = (160, 320), 4, Factors.together
    found = kept(make, Counter({shape: count}), torch.float16, Counter({shape: count}))
    Factors.together = (0, 0)  # one matrix after another, as those of a real size
    try:
        real = memory._held(make, shape, count, torch.float16, linear=True)
    finally:
        Factors.together = together
    assert found.peak >= found.beside >= found.state
    for ours, theirs in zip(found, real, strict=True):  # a step's few numbers are the optimizer's
        assert ours == pytest.approx(theirs, rel=0.002, abs=1000)


def test_the_examples_have_the_models_sizes():
    """As published: 12.85 and 8.03 thousand million parameters."""
    for name, size in (("opt-13b", 12_853_473_280), ("llama-3-8b", 8_030_261_248)):
        config = load_config(str(EXAMPLES / f"{name}.json"), alone=True)
        shapes = Outline(config, torch.float16).shapes()
        assert sum(torch.Size(s).numel() * count for s, count in shapes.items()) == size


def test_a_table_of_one_method(tmp_path, capsys):
    tiny_models.config("llama").save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path / "config.json"), "--method", "lozo-m"]
    assert main([*words, "--batch-size", "2", "--length", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(llama): 25,760 parameters" in lines[0]
    assert lines[1] == "weights: float32 101 KiB, float16 50 KiB, bfloat16 50 KiB"
    assert [line.split("  ")[0] for line in lines[5:7]] == ["LOZO-M, factored", ""]
    states = []
    for rank in ("2", "4"):
        assert main([*words, "--rank", rank, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["methods"]
        states.append(row["state"])
    assert states[1] > states[0] > 0


def test_experts_and_what_looks_at_values(tmp_path, capsys):
    tiny_models.config("qwen3_moe").save_pretrained(tmp_path)
    sizes = {}
    for dtype in ("bfloat16", "float32"):
        outline = Outline(tiny_models.config("qwen3_moe"), getattr(torch, dtype))
        sizes[dtype] = outline.activations(2, 8)
    assert sizes["float32"] == 2 * sizes["bfloat16"] > 0
    tiny_models.config("jetmoe").save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--method", "mezo"]) == 0
    assert "can't be told without weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a valid JSON file"),
        ('{"model_type": "t5"}', "t5 models have an encoder and a decoder"),
        ('{"model_type": "vit"}', "vit models are no language models"),
        ('{"model_type": "llama", "num_attention_heads": 7}', "hidden"),
    ],
)
def test_mistakes(tmp_path, capsys, content, message):
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["plan", "--model", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
