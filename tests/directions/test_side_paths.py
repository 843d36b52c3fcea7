"""Side paths: a module that computes with ``scale W + B V^T`` while W stays as it is.

The truth is the same module with the weights written. Side paths add the same terms in another
order. One product of length n in a dtype with unit roundoff u is off by at most about n u relative
to the sum of its terms' sizes; over the two layers of these models, with widths of at most 64 and
terms of size one, ``TOLERANCE = 64 u``, relative to the largest output, leaves room for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_fused.directions.factored.pairs import run_pair
from zo_fused.directions.factored.side_paths import SidePaths
from zo_fused.directions.factored.side_weight import SideWeight
from zo_fused.step.direction import UsedOtherwise

RANK = 2
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FAMILIES = ("opt", "llama", "qwen2", "gpt2")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Setting:
    """A module with random factors for its matrices, and new values for everything else."""

    def __init__(
        self,
        module: nn.Module,
        scale: float | None = 0.75,
        trained: Callable[[str], bool] = lambda name: True,
        size: float = 0.1,
    ) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(p: Tensor, *shape: int) -> Tensor:
            return size * torch.randn(*shape, generator=generator).to(p.dtype)

        named = [(n, p) for n, p in module.named_parameters() if trained(n)]
        self.module = module
        self.params = [p for _, p in named if p.dim() == 2]
        self.others = [p for _, p in named if p.dim() != 2]
        self.vs = [10 * normal(p, p.shape[1], RANK) for p in self.params]
        self.bs = [normal(p, p.shape[0], RANK) for p in self.params]
        self.us = [normal(p, p.shape[0], RANK) for p in self.params]
        self.moves = [normal(p, *p.shape) for p in self.others]
        self.scales = [None if scale is None else torch.tensor(scale) for _ in self.params]
        self.paths = SidePaths(module, self.params, self.vs, self.bs, self.scales)

    def written(self, compute: Callable[[], Any], sign: float | None = None) -> Any:
        """What it computes with weights written; with a sign, also B and the others moved."""
        everyone = [*self.params, *self.others]
        before = [p.clone() for p in everyone]
        try:
            for p, v, b, u, scale in zip(
                self.params, self.vs, self.bs, self.us, self.scales, strict=True
            ):
                b = b if sign is None else b + sign * u
                scaled = p.double() * (1.0 if scale is None else scale.double())
                p.copy_(scaled + b.double() @ v.double().T)
            for p, move in zip(self.others, self.moves, strict=True):
                p.add_(move, alpha=sign or 0.0)
            return compute()
        finally:
            for p, old in zip(everyone, before, strict=True):
                p.copy_(old)

    def both(self, closure: Callable[[], Any]) -> Tensor:
        pairs = [torch.stack((b + u, b - u)) for b, u in zip(self.bs, self.us, strict=True)]
        values = [
            (p, torch.stack((p + move, p - move)))
            for p, move in zip(self.others, self.moves, strict=True)
        ]
        return self.paths.both(closure, pairs, values)

    def beside(self, compute: Callable[[], Any]) -> Any:
        with self.paths.attached():
            return compute()


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if not got.numel():
        return
    tolerance = 64 * ROUNDOFF[dtype or got.dtype] * wanted.double().abs().max()
    assert (got.double() - wanted.double()).abs().max() <= tolerance


def model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 97}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {"intermediate_size": 64, "num_key_value_heads": 2}
    config = {
        "opt": lambda: transformers.OPTConfig(
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **tokens,
            **shape,
            **options,
        ),
        "llama": lambda: transformers.LlamaConfig(**grouped, **tokens, **shape, **options),
        "qwen2": lambda: transformers.Qwen2Config(**grouped, **tokens, **shape, **options),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            loss_type="ForCausalLM",
            **tokens,
            **options,
        ),
    }[family]()
    torch.manual_seed(0)
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made.eval()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ---- single layers ------------------------------------------------------------------------------


class Functional(nn.Module):
    """A weight (m, n) and the use of it that a test is about."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], m: int = 24, n: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(m, n))
        self.bias = nn.Parameter(torch.randn(n))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


INTO = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))  # x of x W^T
OUT_OF = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))  # x of x W
ROWS = torch.randint(24, (3, 5), generator=torch.Generator().manual_seed(0))
COLUMNS = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(0))

USES: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (INTO, lambda x, w: F.linear(x, w)),
    "linear of a vector": (INTO[0, 0], lambda x, w: F.linear(x, w)),
    "linear of nothing": (INTO[:0], lambda x, w: F.linear(x, w)),
    "linear with names": (INTO, lambda x, w: F.linear(input=x, weight=w, bias=None)),
    "linear of strides": (INTO.transpose(0, 1), lambda x, w: F.linear(x, w)),
    "linear of other strides": (INTO.mT.contiguous().mT, lambda x, w: F.linear(x, w)),
    "linear to the same dtype": (INTO, lambda x, w: F.linear(x, w.to(x.dtype))),
    "linear, transposed": (OUT_OF, lambda x, w: F.linear(x, w.t())),
    "x @ W": (OUT_OF, lambda x, w: x @ w),
    "x @ W.T": (INTO, lambda x, w: x @ w.T),
    "matmul": (INTO, lambda x, w: torch.matmul(x, w.t())),
    "mm": (OUT_OF[0], lambda x, w: x.mm(w)),
    "addmm": (OUT_OF[0], lambda x, w: torch.addmm(torch.ones(40), x, w)),
    "embedding": (ROWS, lambda x, w: F.embedding(x, w, padding_idx=1)),
    "embedding of a transpose": (COLUMNS, lambda x, w: F.embedding(x, w.T)),
    "torch.embedding": (ROWS, lambda x, w: torch.embedding(w, x)),
    "vmap of linear": (INTO, lambda x, w: torch.vmap(lambda row: F.linear(row, w))(x)),
    "vmap of embedding": (ROWS, lambda x, w: torch.vmap(lambda row: F.embedding(row, w))(x)),
    "two uses": (INTO, lambda x, w: F.linear(x, w) @ w),
    "what its metadata says": (
        INTO,
        lambda x, w: F.linear(x.to(w.dtype).to(w.device), w) * w.shape[0] / w.size(1) / w.dim(),
    ),
}


@pytest.mark.parametrize("scale", [None, 0.75])
@pytest.mark.parametrize("name", USES)
def test_functions_compute_with_the_sum(name, scale):
    x, use = USES[name]
    setting = Setting(Functional(use), scale)
    assert_close(
        setting.beside(lambda: setting.module(x)), setting.written(lambda: setting.module(x))
    )


@pytest.mark.parametrize("name", sorted(set(USES) - {"linear of nothing"}))
def test_functions_compute_with_both_signs(name):
    x, use = USES[name]
    setting = Setting(Functional(use))

    def loss() -> Tensor:
        return setting.module(x).square().mean()

    wanted = [setting.written(loss, sign) for sign in (1.0, -1.0)]
    assert_close(setting.both(loss), torch.stack(wanted))


@pytest.mark.parametrize(
    ("x", "use", "function"),
    [
        (INTO, lambda x, w: F.linear(x, w * 2), "mul"),
        (INTO, lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)), "norm"),
        (INTO, lambda x, w: F.linear(x, w.to(torch.float64)), "to"),
        (INTO, lambda x, w: F.linear(x, w.clone()), "clone"),
        (INTO, lambda x, w: F.linear(x, w.data), "data"),
        (INTO, lambda x, w: F.linear(w, w), "linear"),
        (INTO, lambda x, w: torch.cat([x[0], w]), "cat"),
        (INTO, lambda x, w: x + w.data_ptr(), "data_ptr"),
        (INTO, lambda x, w: x + w[0], "__getitem__"),
        (INTO, lambda x, w: torch.einsum("abi,oi->abo", x, w), "einsum"),
        (OUT_OF, lambda x, w: torch.addmm(torch.ones(40), x[0], w, beta=2), "addmm"),
        (INTO, lambda x, w: w @ x.mT, "__matmul__"),
        (INTO, lambda x, w: w.zero_(), "zero_"),
        (ROWS, lambda x, w: F.embedding(x, w, max_norm=0.1), "embedding"),
        (ROWS, lambda x, w: F.embedding_bag(x, w), "embedding_bag"),
    ],
)
def test_other_uses_raise_before_anything_is_computed(x, use, function):
    setting = Setting(Functional(use))
    before = setting.module.weight.clone()
    for run in (setting.beside, setting.both):
        with pytest.raises(UsedOtherwise) as caught:
            run(lambda: setting.module(x).mean())
        assert caught.value.param is setting.module.weight
        assert caught.value.function.strip("_") == function.strip("_")
    assert torch.equal(setting.module.weight, before)


def test_code_that_bypasses_torch_meets_no_data():
    """An extension in C++ would take the pointer; it must not get that of W."""
    weight = nn.Parameter(torch.randn(3, 4))
    stand_in = SideWeight.make(weight, torch.zeros(3, 1), torch.zeros(4, 1), None)
    with torch._C.DisableTorchFunctionSubclass():
        assert stand_in.is_meta
        assert stand_in.data_ptr() == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(40, 24),
        nn.Linear(40, 24, bias=False),
        nn.Embedding(40, 24),
        nn.Embedding(40, 24, padding_idx=0),
    ],
    ids=str,
)
def test_layers(layer):
    setting = Setting(layer)
    x = COLUMNS if isinstance(layer, nn.Embedding) else INTO
    assert_close(setting.beside(lambda: layer(x)), setting.written(lambda: layer(x)))


def test_the_values_of_factors_and_scales_are_read_in_every_pass():
    setting = Setting(nn.Linear(40, 24))
    for _ in range(2):
        got = setting.beside(lambda: setting.module(INTO))
        assert_close(got, setting.written(lambda: setting.module(INTO)))
        setting.bs[0].mul_(-3)
        setting.vs[0].add_(1)
        setting.scales[0].mul_(0.5)


# ---- the module is what it was ------------------------------------------------------------------


def table(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]


class Boom(Exception):
    pass


@pytest.mark.parametrize("leave", ["normally", "an exception", "used otherwise"])
@pytest.mark.parametrize("paired", [False, True])
def test_the_module_holds_its_own_parameters_again(leave, paired):
    setting = Setting(model("opt"))
    before, state = table(setting.module), setting.module.state_dict()
    values = {name: value.clone() for name, value in state.items()}

    def closure() -> Tensor:
        assert isinstance(setting.module.lm_head.weight, SideWeight)
        if leave == "an exception":
            raise Boom
        if leave == "used otherwise":
            setting.module.lm_head.weight.norm()
        return setting.module(**batch()).loss

    run = setting.both if paired else setting.beside
    if leave == "normally":
        run(closure)
    else:
        with pytest.raises((Boom, UsedOtherwise)):
            run(closure)
    assert table(setting.module) == before
    assert all(type(p) is nn.Parameter for p in setting.module.parameters())
    assert all(torch.equal(values[name], value) for name, value in state.items())
    if leave == "normally":  # and side paths are those of B, not of both signs
        one = setting.beside(lambda: setting.module(**batch()).logits)
        assert_close(one, setting.written(lambda: setting.module(**batch()).logits))


def test_which_parameters_are_where():
    opt = model("opt")
    stranger, cube = nn.Parameter(torch.zeros(4, 4)), nn.Conv1d(2, 2, 2)
    whole = nn.ModuleDict({"opt": opt, "cube": cube})
    params = [opt.lm_head.weight, stranger, cube.weight]
    paths = SidePaths(
        whole, params, *([torch.zeros(p.shape[i], 1) for p in params] for i in (1, 0)), [None] * 3
    )
    assert paths.names[0] == ["opt.model.decoder.embed_tokens.weight", "opt.lm_head.weight"]
    assert paths.left_out == {1: "is held by no submodule", 2: "has 3 dimensions"}


def test_a_module_that_was_changed_is_noticed():
    setting = Setting(nn.Sequential(nn.Linear(8, 8)))
    own = setting.module[0].weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match=r"0.weight holds another parameter"):
        setting.beside(lambda: None)
    assert setting.module[0].weight is own


def test_code_around_the_forward_pass_may_look_at_the_weights():
    setting = Setting(nn.Linear(8, 8))

    def look() -> tuple[bool, int]:
        setting.module.zero_grad()
        weight = setting.module.weight
        return weight.requires_grad and weight.is_leaf and not weight.is_meta, len(weight)

    assert setting.beside(look) == (True, 8)


@pytest.mark.parametrize("where", ["closure", "other module", "list", "argument"])
def test_watching_finds_uses_that_bypass_the_module(where):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.weights = [self.second.weight]

        def recall(self, x: Tensor) -> Tensor:
            return F.linear(x, *self.weights)

    two = Two()
    twin = nn.Linear(8, 8)
    twin.weight = two.first.weight
    held = two.first.weight
    setting = Setting(two)
    x = torch.ones(2, 3, 8)
    uses = {
        "closure": lambda: two.first(x) + F.linear(x, held),
        "other module": lambda: twin(x),
        "list": lambda: two.recall(x),
        "argument": lambda: torch.cat([x[0], held]),
    }
    setting.beside(uses[where])  # not found without watching
    with pytest.raises(UsedOtherwise) as caught, setting.paths.watching():
        setting.beside(uses[where])
    assert caught.value.param is (two.second.weight if where == "list" else held)
    with setting.paths.watching():
        got = setting.beside(lambda: two.first(x))
    assert_close(got, setting.written(lambda: two.first(x)))


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, dtype):
    """Tied weights (all but Llama), Conv1D (GPT-2), an embedding with an offset (OPT)."""
    setting = Setting(model(family, dtype))
    assert not setting.paths.left_out
    with setting.paths.watching():
        got = setting.beside(lambda: setting.module(**batch()).logits)
    assert_close(got, setting.written(lambda: setting.module(**batch()).logits))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # between peft and transformers
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_lora(kind):
    peft = pytest.importorskip("peft")
    target = {"linear": ["q_proj", "v_proj"], "embedding": ["embed_tokens"]}[kind]
    config = peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    tuned = peft.get_peft_model(model("llama"), config).eval()
    setting = Setting(tuned, trained=lambda name: "lora_" in name)
    assert len(setting.params) == (8 if kind == "linear" else 2)
    with setting.paths.watching():
        got = setting.beside(lambda: tuned(**batch()).logits)
    assert_close(got, setting.written(lambda: tuned(**batch()).logits))
    wanted = [setting.written(lambda: tuned(**batch()).loss, sign) for sign in (1.0, -1.0)]
    assert_close(setting.both(lambda: tuned(**batch()).loss), torch.stack(wanted))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family, paired):
    """Both round to bfloat16 where autocast does, and the truth rounds W + B V^T there too."""
    setting = Setting(model(family))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return setting.module(**batch()).loss

    signs = (1.0, -1.0) if paired else (None,)
    wanted = torch.stack([setting.written(loss, sign) for sign in signs])
    got = setting.both(loss) if paired else setting.beside(loss)[None]
    assert_close(got, wanted, torch.bfloat16)


# ---- both signs in one pass ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_signs_of_models(family, attention, dtype):
    setting = Setting(model(family, dtype, attn_implementation=attention))
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return setting.module(**batch()).loss

    got = setting.both(loss)
    assert calls == 1
    wanted = [setting.written(loss, sign) for sign in (1.0, -1.0)]
    assert abs(wanted[0] - wanted[1]) > 1e-2
    assert_close(got, torch.stack(wanted), dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_that_of_one_evaluation_in_both_signs(family, attention):
    rate = {"opt": "dropout", "gpt2": "resid_pdrop"}.get(family, "attention_dropout")
    inputs = batch()
    options = {rate: 0.2, "attention_dropout": 0.2} if family == "opt" else {rate: 0.2}
    setting = Setting(model(family, attn_implementation=attention, **options).train())

    def loss(seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return setting.module(**inputs).loss

    wanted = [setting.written(loss, sign) for sign in (1.0, -1.0)]
    assert abs(wanted[0] - setting.written(lambda: loss(1), 1.0)) > 1e-3  # masks are drawn
    torch.manual_seed(0)
    assert_close(setting.both(lambda: setting.module(**inputs).loss), torch.stack(wanted))


@pytest.mark.parametrize("masks", ["none", "causal", "one", "per row", "2-D"])
def test_attention_of_both_signs(masks):
    """Masks of all shapes, batched over the sign by themselves too, keys that are the same."""
    torch.manual_seed(0)
    tensors = dict(zip(("query", "key", "value"), torch.randn(3, 2, 3, 4, 5, 8), strict=True))
    shapes = {"one": (1, 1, 5, 5), "per row": (3, 1, 5, 5), "2-D": (5, 5)}
    if masks in shapes:
        tensors["attn_mask"] = torch.randn(2, *shapes[masks])

    def attend(moving: dict[str, Tensor], fixed: dict[str, Tensor]) -> Tensor:
        causal = masks == "causal"
        return F.scaled_dot_product_attention(**moving, **fixed, is_causal=causal).square().sum()

    for names in ({"query"}, {"query", "value"}, {"value", "attn_mask"}, set(tensors)):
        names = [name for name in tensors if name in names]
        fixed = {name: t[0] for name, t in tensors.items() if name not in names}
        stack = [tensors[name] for name in names]

        def run(moving: list[Tensor], names=names, fixed=fixed) -> Tensor:
            return attend(dict(zip(names, moving, strict=True)), fixed)

        wanted = [run([t[i] for t in stack]) for i in (0, 1)]
        assert_close(run_pair(run, [stack]), torch.stack(wanted))  # without a warning


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # rms_norm is slower so
@pytest.mark.parametrize("norm", [F.layer_norm, F.group_norm, F.rms_norm])
def test_norms_in_float32_give_16_bits_their_dtype_back(norm):
    """As one evaluation does."""
    x = torch.randn(2, 8, 4).bfloat16()

    def run(weights: list[Tensor]) -> Tensor:
        out = norm(x, 2 if norm is F.group_norm else (4,), weights[0])
        assert out.dtype == torch.bfloat16
        return out.float().square().mean()

    stack = torch.randn(2, 8 if norm is F.group_norm else 4)
    wanted = torch.stack([run([w]) for w in stack])
    torch.testing.assert_close(run_pair(run, [[stack]]), wanted, rtol=2**-7, atol=0)


def test_a_loss_that_is_a_number_cannot_be_paired():
    setting = Setting(model("opt"))
    for closure in (lambda: 1.0, lambda: setting.module(**batch()).loss.item()):
        with pytest.raises(TypeError, match=r"the loss as a tensor"):
            setting.both(closure)
    with pytest.raises(TypeError, match=r"scalar loss, got shape \(2, 9, 97\)"):
        setting.both(lambda: setting.module(**batch()).logits)


def test_a_model_that_cannot_be_batched_says_so():
    def branching(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return y if y.sum() > 0 else -y

    setting = Setting(Functional(branching))
    with pytest.raises(RuntimeError, match=r"torch.vmap can batch: .*; use paired=False"):
        setting.both(lambda: setting.module(INTO).mean())


def test_other_errors_of_the_closure_stay_what_they_are():
    setting = Setting(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        setting.both(lambda: setting.module(torch.ones(3, 7)).mean())
    assert "paired" not in str(caught.value)


def test_paired_values_must_be_in_the_module():
    setting = Setting(nn.Linear(8, 8))
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="use paired=False"):
        setting.paths.both(lambda: 0.0, [torch.zeros(2, 8, RANK)], [(stranger, torch.zeros(2, 3))])


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_models_see_new_values_without_compiling_again(family):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    setting = Setting(model(family))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(setting.module, backend=counter)
    with setting.paths.watching():
        setting.beside(lambda: compiled(**batch()))
    assert counter.frame_count == 0
    count = None
    for _ in range(3):
        got = setting.beside(lambda: compiled(**batch()).logits)
        assert_close(got, setting.written(lambda: setting.module(**batch()).logits))
        for b, v, scale in zip(setting.bs, setting.vs, setting.scales, strict=True):
            b.mul_(-1)
            v.mul_(0.9)
            scale.mul_(0.9)
        assert count in (None, counter.frame_count)
        count = counter.frame_count
    # Plain weights are another case: compiled once, and both cases stay.
    plain = setting.module(**batch()).logits
    for _ in range(2):
        assert_close(compiled(**batch()).logits, plain)
        count = max(count, counter.frame_count)
        setting.beside(lambda: compiled(**batch()))
    assert counter.frame_count == count


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_code_says_used_otherwise():
    torch._dynamo.reset()
    setting = Setting(Functional(lambda x, w: F.linear(x, w * 2)))
    compiled = torch.compile(setting.module, backend="eager")
    with pytest.raises(UsedOtherwise, match="mul"):
        setting.beside(lambda: compiled(INTO))
    assert_close(compiled(INTO), setting.module(INTO))


def test_compiled_models_run_paired_eagerly():
    torch._dynamo.reset()
    setting = Setting(model("llama"))
    compiled = torch.compile(setting.module, backend="eager")
    wanted = [setting.written(lambda: setting.module(**batch()).loss, s) for s in (1.0, -1.0)]
    assert_close(setting.both(lambda: compiled(**batch()).loss), torch.stack(wanted))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_inductor():
    torch._dynamo.reset()
    setting = Setting(model("llama"))
    compiled = torch.compile(setting.module)
    got = setting.beside(lambda: compiled(**batch()).logits)
    assert_close(got, setting.written(lambda: setting.module(**batch()).logits))
