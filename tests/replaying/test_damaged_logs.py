"""Logs that are damaged, edited, of another version or of other weights: refused by name."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.logs import records_of, write_records, write_texts
from support.models import loss_of, network, same
from torch import Tensor, nn

import zo_fused
from zo_fused.step import fingerprint, log_lines, log_records
from zo_fused.step.optimizer import ZerothOrderOptimizer


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of two steps."""
    model, log = network(), tmp_path / "log.jsonl"
    run(zo_fused.MeZO(model, lr=1e-2), model, log, steps=2)
    return log


def run(opt: ZerothOrderOptimizer, model: nn.Module, log: Path, steps: int) -> None:
    opt.start_log(log)
    for _ in range(steps):
        opt.step(loss_of(model))
    opt.close_log()


def edit(log: Path, line: int, change: Callable[[object], object]) -> None:
    """Another record, with the checksums that belong to it."""
    records = records_of(log)
    records[line] = change(records[line])
    write_texts(log, [json.dumps(record) for record in records])


def header(**values: object) -> Callable[[object], object]:
    return lambda value: {**value, **values}  # type: ignore[dict-item]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "contract": (lambda log: edit(log, 0, header(contract=2)), "contract 2"),
    "version": (lambda log: edit(log, 0, header(version=9)), "version 9"),
    "method": (lambda log: edit(log, 0, header(method="SGD")), "method 'SGD'"),
    "other file": (lambda log: edit(log, 0, lambda _: {"a": 1}), "not a zo_fused replay log"),
    "event": (lambda log: edit(log, 2, lambda _: [1, "x"]), "line 3: not an event"),
    "text": (lambda log: log.write_text(log.read_text() + "what\n"), "line 4: not a record with"),
    "empty": (lambda log: log.write_text(""), "no complete header"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_logs_are_refused_and_weights_stay(log: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(log)
    base = network()
    with pytest.raises(ValueError, match=message):
        zo_fused.replay(base, log)
    assert same(base, network())


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dtype": (lambda: network(torch.float16), "load the base model in the dtype of the run"),
    "shape": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), r"\[9, 6\]"),
    "names": (lambda: nn.ModuleDict({"x": network()}), "no parameter '0.weight'"),
    "weights": (lambda: network().apply(lambda m: m), "other base weights"),
}


@pytest.mark.parametrize("misfit", list(MISFITS))
def test_models_that_do_not_fit_are_refused(log: Path, misfit: str) -> None:
    build, message = MISFITS[misfit]
    model = build()
    if misfit == "weights":
        with torch.no_grad():
            model[2].bias[0] += 1
    with pytest.raises(ValueError, match=message):
        zo_fused.replay(model, log)


class Codes(Tensor):
    """A quantized weight as those of torchao: other tensors inside, and no views."""

    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Codes:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple, kwargs: object) -> Codes:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_a_frozen_quantized_weight_is_part_of_the_base(tmp_path: Path) -> None:
    def base(code: int) -> nn.Module:
        model = network()
        codes = torch.full((3, 3), code, dtype=torch.int8)
        model.frozen = nn.Parameter(Codes(codes, torch.ones(3)), requires_grad=False)
        return model

    model = base(1)
    run(zo_fused.MeZO(model, lr=1e-2), model, tmp_path / "log", 3)
    replayed = base(1)
    assert zo_fused.replay(replayed, tmp_path / "log") == 3
    assert torch.equal(replayed[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="other base weights"):
        zo_fused.replay(base(2), tmp_path / "log")


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zo_fused.replay(network(), tmp_path / "none.jsonl")


def test_reader_gives_settings_to_every_event(log: Path) -> None:
    record = log_lines.read(log, 1)
    assert [e.step for e in record.events] == [0, 1]
    assert all(e.groups[0]["lr"] == 1e-2 and e.trainable == [0, 1, 2, 3] for e in record.events)


def line(value: object) -> Callable[[Path], None]:
    """The first event of the log is another."""
    return lambda log: edit(log, 1, lambda _: value)


def text_of_line(text: str) -> Callable[[Path], None]:
    def change(log: Path) -> None:
        texts = [json.dumps(record) for record in records_of(log)]
        write_texts(log, [texts[0], text, *texts[2:]])

    return change


def of_group(**values: object) -> Callable[[Path], None]:
    return lambda log: edit(
        log,
        0,
        lambda value: {**value, "groups": [{**value["groups"][0], **values}]},  # type: ignore
    )


def of_header(**values: object) -> Callable[[Path], None]:
    return lambda log: edit(log, 0, header(**values))


def without(name: str) -> Callable[[Path], None]:
    return lambda log: edit(log, 0, lambda v: {k: v[k] for k in v if k != name})  # type: ignore


def with_bytes(log: Path, record: bytes) -> None:
    """One more record, with its checksum."""
    checksum = zlib.crc32(record, log_lines.read(log, 1).checksum)
    log.write_bytes(log.read_bytes() + b'[%b,"%08x"]\n' % (record, checksum))


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "step removed": (
        lambda log: write_records(log, records_of(log)[::2]),
        "line 2: not an event .step 1 comes where step 0 is due",
    ),
    "step twice": (lambda log: edit(log, 2, lambda _: [0, 1.0]), "step 0 comes where step 1 is"),
    "step of another kind": (line([0.0, 1.0]), "step 0.0 comes where step 0 is due"),
    "step before the first": (line([-1, 1.0]), "step -1 comes where"),
    "first step": (of_header(first_step=-1), r"first_step must be a whole number in \[0, "),
    "nan": (text_of_line("[0,NaN]"), "line 2: not JSON .NaN is no number of JSON"),
    "infinity": (text_of_line("[0,-Infinity]"), "line 2: not JSON .-Infinity is no number"),
    "too large for float32": (line([0, 3.5e38]), "a finite number, got 3.5e\\+38"),
    "infinite": (text_of_line("[0,1e999]"), "a finite number, got inf"),
    "a number of 400 digits": (
        text_of_line(f"[0,1,[[1{'0' * 400},0]]]"),
        "a finite number, got 1000",
    ),
    "text for a number": (line([0, "1.5"]), "a finite number, got '1.5'"),
    "true for a number": (line([0, True]), "a finite number, got True"),
    "two gradients": (line([0, [1.0, 1.0]]), "it has 2 projected gradients, not 1"),
    "a query that the run lacks": (line([0, 1.0, [[1, 7]]]), "a query must be a whole number in"),
    "three numbers": (line([0, 1.0, [[1, 0, 3]]]), r"\[1, 0, 3\] is no perturbation"),
    "a sign alone": (line([0, 1.0, [1.0]]), "1.0 is no perturbation"),
    "true for a query": (line([0, 1.0, [[1, True]]]), "a query must be a whole number in"),
    "coefficients": (line([0, 1.0, [{"at": [1, 2]}]]), "at has 2 values, not 1"),
    "no path": (line([0, "restore"]), "a restore has no path"),
    "no event": (line([0]), "it has 1 values, not two to four"),
    "position": (line({"trainable": [4]}), r"a position in trainable must .* \[0, 4\), got 4"),
    "position twice": (line({"trainable": [1, 1]}), "trainable has a position twice"),
    "settings": (line({"seed": 1}), "there is no setting 'seed'"),
    "groups": (line({"groups": []}), "there are 0 groups, not 1"),
    "lr": (of_group(lr=-1.0), "lr is -1.0"),
    "eps": (of_group(eps=0), "eps is 0"),
    "lr that is no number": (of_group(lr="1"), "lr must be a finite number, got '1'"),
    "block": (of_group(block=0.5), "block must be a whole number, got 0.5"),
    "hyper-parameter": (of_group(momentum=[0.9]), "momentum must be a finite number, got "),
    "hyper-parameters": (line({"groups": [{"lr": 1.0}]}), "a group lacks one of"),
    "nothing that moves": (line({"trainable": []}), "nothing is trainable"),
    "seed": (of_header(seed="3"), "line 1: not a header .seed must be a whole number in"),
    "no groups": (without("groups"), "line 1: not a header .groups is missing"),
    "no bases": (without("bases"), "line 1: not a header .bases is missing"),
    "no parameters": (of_header(parameters=[]), "parameters must not be empty"),
    "parameters": (of_header(parameters=[["a", [1], "float32", 1]]), "the group of a parameter"),
    "queries": (of_header(options={"queries": 10**9}), r"queries must .* \[0, 1048576\)"),
    "population": (
        of_header(options={"population": 10**9}),
        "line 1: not a header .population must",
    ),
    "history": (
        of_header(options={"history": 10**12}),
        "line 1: not a header .history must",
    ),
    "rank": (of_group(rank=10**6), "line 1: not a header .rank 1000000 is that of no matrix"),
    "many values": (text_of_line("[" + "{}," * 2**23 + "{}]"), "line 2: longer than any record"),
    "brackets": (text_of_line("[" * 100_000), "line 2: not JSON"),
    "encoding": (lambda log: with_bytes(log, b"\xff"), "line 4: not JSON"),
    "number of digits": (text_of_line(f"[{'1' * 9999},1]"), "line 2: not JSON"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_logs_are_refused_and_weights_stay(log: Path, name: str) -> None:
    change, message = EDITS[name]
    change(log)
    base = network()
    with pytest.raises(ValueError, match=message) as refused:
        zo_fused.replay(base, log)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300 + len(str(log))
    assert same(base, network())


def test_a_log_that_would_be_refused_is_not_begun(tmp_path: Path) -> None:
    opt = zo_fused.LOZO(network(), rank=2000)
    with pytest.raises(ValueError, match="have no replay log: rank 2000 is that of no"):
        opt.start_log(tmp_path / "log.jsonl")
    assert not list(tmp_path.iterdir())


# ---- checksums ----------------------------------------------------------------------------------


def changed_lines(log: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    log.write_bytes(b"".join(change(log.read_bytes().splitlines(True))))


LINES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "missing": (lambda lines: [*lines[:2], *lines[3:]], 3),
    "doubled": (lambda lines: [*lines[:2], *lines[1:]], 3),
    "swapped": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
    "edited": (lambda lines: [*lines[:3], lines[3].replace(b"[2,", b"[3,")], 4),
    "of another header": (lambda lines: [lines[0].replace(b"MeZO", b"LOZO"), *lines[1:]], 1),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_are_not_where_they_were_written(tmp_path: Path, name: str) -> None:
    change, number = LINES[name]
    model, base, log = network(), network(), tmp_path / "log.jsonl"
    run(zo_fused.MeZO(model, lr=1e-2), model, log, steps=3)
    changed_lines(log, change)
    with pytest.raises(ValueError, match=rf"log\.jsonl, line {number}: the checksum is wrong"):
        zo_fused.replay(base, log)
    assert same(base, network())


def test_no_byte_can_be_changed(log: Path) -> None:
    """Every byte of the file, in a bit of its own; or it is where the last line ends."""
    whole = log.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        log.write_bytes(changed)
        if place == len(whole) - 1:
            assert len(log_lines.read(log, 1).events) == 1  # it was cut off, as it seems
        else:
            with pytest.raises(ValueError, match=r"log\.jsonl"):
                log_lines.read(log, 1)


def test_a_log_of_the_first_version_is_refused_with_what_to_do(log: Path) -> None:
    texts = [json.dumps(record, separators=(",", ":")) for record in records_of(log)]
    log.write_text("\n".join(texts).replace('"version":2', '"version":1') + "\n")
    with pytest.raises(ValueError, match=r"written with version 1 .*: replay it with the version"):
        zo_fused.replay(network(), log)


def test_a_line_without_end_does_not_fill_the_memory(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_records, "_LONGEST", 4096)
    log.write_bytes(log.read_bytes() + b"[" + b"1," * 4096)
    with pytest.raises(ValueError, match="line 4: longer than any record"):
        log_lines.read(log, 1)
    with pytest.raises(ValueError, match="too long for a replay log"):
        log_records.line_of("1" * 4096, 0)


def test_a_number_that_is_not_finite_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        log_records.line_of([0, float("nan")], 0)


def test_a_state_goes_with_its_own_log_alone(tmp_path: Path) -> None:
    """The same run from another base has another log, though its header differs in nothing else."""
    states = []
    for number in range(2):
        model = network()
        with torch.no_grad():
            model[2].weight[1, 3] += number
        opt = zo_fused.MeZO(model, lr=1e-2)
        run(opt, model, tmp_path / f"{number}.jsonl", steps=2)
        opt.start_log(tmp_path / f"{number}.jsonl", resume=True)
        states.append(opt.state_dict())
        opt.close_log()
    for of_state in range(2):
        for of_log in range(2):
            again, log = zo_fused.MeZO(network(), lr=1e-2), tmp_path / f"{of_log}.jsonl"
            again.load_state_dict(states[of_state])
            if of_state == of_log:
                again.start_log(log, resume=True)
            else:
                with pytest.raises(ValueError, match="not the log that the state was saved with"):
                    again.start_log(log, resume=True)


def test_a_log_without_steps_goes_on_from_its_base_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run(zo_fused.MeZO(network(), lr=1e-2), network(), log, steps=0)
    zo_fused.MeZO(network(), lr=1e-2).start_log(log, resume=True)
    other = network()
    with torch.no_grad():
        other[2].weight[1, 3] += 1
    with pytest.raises(ValueError, match="other base weights"):
        zo_fused.MeZO(other, lr=1e-2).start_log(log, resume=True)


# ---- the base -----------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)


def by_definition(x: Tensor) -> int:
    """The sum of the fingerprint's definition, word by word."""
    data = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    total, golden = x.numel() * x.element_size(), 0x9E3779B97F4A7C15
    for start in range(0, len(words), 65536):
        block = 0
        for j, word in enumerate(words[start : start + 65536]):
            z = (j + 1) * golden % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            block += word * (z ^ z >> 31 | 1)
        total = (total * golden + block) % 2**64
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (2, 3, 5)], ids=str)
def test_the_sum_is_its_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 9).to(dtype)
    assert fingerprint.weighted_sum(x) == by_definition(x)
    assert fingerprint.weighted_sum(x.t() if x.dim() == 2 else x) == by_definition(
        x.t() if x.dim() == 2 else x
    )


def test_long_tensors_whatever_their_memory_on_cpu_and_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several pieces and a rest; GPUs sum otherwise, over the same numbers."""
    memory = torch.randn(2 * 65536 * 3 + 12).half()
    wanted = by_definition(memory[1:-4])
    monkeypatch.setattr(fingerprint, "_PIECE", 2 * 4 * 65536)
    assert fingerprint.weighted_sum(memory[1:-4]) == wanted  # at an odd address
    monkeypatch.setattr(fingerprint, "_sums_on_cpu", fingerprint._sums_elsewhere)
    assert fingerprint.weighted_sum(memory[1:-4]) == wanted


def test_the_fingerprint_sees_every_bit() -> None:
    x = torch.randn(9, 31).bfloat16()
    found = {fingerprint.fingerprint([x])}
    bits = x.view(torch.int16)
    for place in range(x.numel()):
        for bit in (0, 7, 15):
            bits.view(-1)[place] ^= -(2**15) if bit == 15 else 1 << bit
            found.add(fingerprint.fingerprint([x]))
            bits.view(-1)[place] ^= -(2**15) if bit == 15 else 1 << bit
    assert len(found) == 1 + 3 * x.numel()


def test_the_fingerprint_sees_order_shape_and_dtype() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    signs = x.clone()
    signs[0, 0], signs[3, 5] = -signs[0, 0], -signs[3, 5]
    swapped = x[[1, 0, 2, 3]]
    cases = [[x, y], [y, x], [signs, y], [swapped, y], [x.view(6, 4), y], [x], [x, y, x]]
    cases += [[x.view(torch.int32), y], [torch.zeros(4, 6), y], [torch.zeros(4, 7), y]]
    assert len({fingerprint.fingerprint(case) for case in cases}) == len(cases)


def test_weights_in_the_middle_are_of_the_base(log: Path) -> None:
    """Not only the ends of every tensor."""
    model = nn.Sequential(nn.Linear(40, 40))
    base = nn.Sequential(nn.Linear(40, 40))
    base.load_state_dict(model.state_dict())
    opt = zo_fused.MeZO(model, lr=1e-2)
    opt.start_log(log)
    opt.step(lambda: model[0].weight.sum())
    with torch.no_grad():
        base[0].weight[20, 20] *= -1
    with pytest.raises(ValueError, match=r"other base weights than these .fingerprint"):
        zo_fused.replay(base, log)
