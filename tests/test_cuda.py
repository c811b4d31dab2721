"""An adapted model moves: to other devices and other dtypes. What needs a GPU is skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, bits, filled, ids, targets_of, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core import graphs
from lora_core.tasks import Row, Task

each_family = pytest.mark.parametrize("family", FAMILIES)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def logits(model: Any) -> torch.Tensor:
    """On the model's device, brought back to the CPU."""
    with torch.no_grad():
        return model(ids().to(next(model.parameters()).device)).logits.cpu()


def all_of(model: Any, **more: Any) -> lc.LoraSpec:
    return lc.LoraSpec(targets=targets_of(model), rank=4, alpha=8, **more)


def fill(adapter: lc.Adapter) -> None:
    """`filled` on any device: the same numbers as on the CPU."""
    device = next(adapter.parameters()).device
    adapter.model.cpu()
    filled(adapter)
    adapter.model.to(device)


def train(model: Any, steps: int = 5) -> list[float]:
    """The losses of some steps of Adam on the factors."""
    adapter = lc.get_adapter(model, "default")
    adam = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    x, losses = ids(4, 9).to(next(model.parameters()).device), []
    for _ in range(steps):
        y = model(x[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), x[:, 1:].flatten())
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return losses


# ---- dtypes, on any machine
@each_family
def test_a_bfloat16_base_keeps_float32_factors(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    base, weights = logits(model), bits(model)
    adapter = lc.attach(model, all_of(model))
    assert torch.equal(logits(model), base)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    filled(adapter)
    changed = logits(model)
    assert changed.dtype == torch.bfloat16
    wide = tiny(family, dtype=torch.bfloat16).float()
    filled(lc.attach(wide, all_of(wide)))
    exact = logits(wide)
    size = float(exact.norm())
    assert float((changed.float() - exact).norm()) < 0.02 * size
    adapter.merge()
    assert float((logits(model).float() - exact).norm()) < 0.02 * size
    adapter.unmerge()
    assert torch.equal(logits(model), changed)
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@each_family
def test_to_float64_after_attach_takes_the_factors_along(family: str) -> None:
    model = tiny(family)
    adapter = filled(lc.attach(model, all_of(model)))
    before = logits(model)
    model.to(torch.float64)
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    after = logits(model)
    torch.testing.assert_close(after, before.double(), rtol=0, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-10)
    adapter.unmerge()
    assert torch.equal(logits(model), after)
    losses = train(model)
    assert losses[-1] < losses[0]


@each_family
def test_to_bfloat16_after_attach_still_computes_trains_and_restores(family: str) -> None:
    """torch casts every parameter of a model, so the factors too; attach after the cast to keep them float32."""
    model = tiny(family)
    adapter = filled(lc.attach(model, all_of(model)))
    before = logits(model)
    model.to(torch.bfloat16)
    weights = bits(model)
    changed = logits(model)
    assert float((changed.float() - before).norm()) < 0.02 * float(before.norm())
    adapter.merge()
    assert float((logits(model).float() - before).norm()) < 0.02 * float(before.norm())
    adapter.unmerge()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_merged_model_that_is_cast_unmerges_to_the_cast_of_w0(dtype: torch.dtype) -> None:
    model = tiny("gpt2")
    weights = {n: v.to(dtype) for n, v in bits(model).items()}
    adapter = filled(lc.attach(model, all_of(model)))
    adapter.merge()
    model.to(dtype)
    adapter.unmerge()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    adapter.merge()
    adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_to_the_device_where_it_is_changes_nothing() -> None:
    model = tiny("gpt_neox")
    adapter = filled(lc.attach(model, all_of(model)))
    before, mine = logits(model), {id(p) for p in adapter.parameters()}
    model.to("cpu")
    assert {id(p) for p in adapter.parameters()} == mine
    assert torch.equal(logits(model), before)


# ---- a GPU
@gpu
@each_family
def test_a_gpu_computes_what_the_cpu_does(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16).float()  # biases are drawn in the model's own dtype
    filled(lc.attach(model, all_of(model)))
    want = logits(model)
    model.cuda()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
    rough = tiny(family, dtype=torch.bfloat16).cuda()
    adapter = lc.attach(rough, all_of(rough))
    assert {(p.device.type, p.dtype) for p in adapter.parameters()} == {("cuda", torch.float32)}
    fill(adapter)
    assert float((logits(rough).float() - want).norm()) < 0.02 * float(want.norm())


@gpu
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_laws_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype).cuda()
    base, weights = logits(model), bits(model)
    adapter = lc.attach(model, all_of(model))
    assert torch.equal(logits(model), base)
    fill(adapter)
    changed = logits(model)
    adapter.merge()
    off = (logits(model).float() - changed.float()).norm() / changed.float().norm()
    assert float(off) < (1e-5 if dtype == torch.float32 else 0.02)
    adapter.unmerge()
    assert torch.equal(logits(model), changed)
    adapter.merge()
    adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


@gpu
@each_family
def test_there_and_back_merged_and_unmerged(family: str) -> None:
    model = tiny(family)
    weights = bits(model)
    adapter = filled(lc.attach(model, all_of(model)))
    want = logits(model)
    model.cuda()
    assert {p.device.type for p in adapter.parameters()} == {"cuda"}
    key = next(iter(adapter.sites))
    assert adapter.W0(key).device.type == "cuda" and adapter.delta(key).B.device.type == "cuda"
    model.cpu()
    assert torch.equal(logits(model), want)
    adapter.merge()  # merged here, unmerged there
    model.cuda()
    adapter.unmerge()
    model.cpu()
    assert torch.equal(logits(model), want)
    model.cuda()
    adapter.merge()
    model.cpu()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


@gpu
@each_family
def test_rows_spectra_and_files_on_a_gpu(family: str, tmp_path: Any) -> None:
    model = tiny(family)
    adapter = filled(lc.attach(model, all_of(model), name="a"))
    want, found = logits(model), lc.spectra(adapter)
    model.cuda()
    with lc.rows(model, ["a", None, "a"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed[[0, 2]], want[[0, 2]], rtol=0, atol=1e-4)
    assert lc.spectra(adapter) == found
    adapter.save(tmp_path)
    adapter.detach()
    again = lc.load_adapter(model, tmp_path, name="again")
    assert {p.device.type for p in again.parameters()} == {"cuda"}
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)


@gpu
@each_family
def test_training_on_a_gpu_goes_as_on_the_cpu(family: str) -> None:
    model = tiny(family)
    lc.attach(model, all_of(model))
    here = train(model)
    other = tiny(family).cuda()
    lc.attach(other, all_of(other))
    assert train(other) == pytest.approx(here, abs=1e-3) and here[-1] < here[0]


@gpu
def test_pissa_and_combinations_on_a_gpu() -> None:
    model = tiny("llama").cuda()
    base = logits(model)
    a = lc.attach(model, lc.LoraSpec(rank=3, init="pissa"), name="a")
    assert torch.equal(logits(model), base)
    fill(a)
    fill(lc.attach(model, lc.LoraSpec(targets=("q",), rank=2), name="b"))
    lc.combine(model, {"a": 1.0, "b": 0.5}, "c", method="svd", rank=2)
    lc.switch(model, None, "c")
    assert logits(model).isfinite().all()


# ---- steps that are recorded and replayed
ROWS = tuple(Row(f"name: place {i} {'x' * (i % 5)}", f"it is a {'very ' * (i % 9)}quiet place {i}") for i in range(24))
TASK = Task(name="t", about="", train=ROWS, test=ROWS[:4], score_name="", scorer=lambda *_: {})
CONFIG = lc.TrainConfig(steps=14, batch_size=3, lr=3e-3, accumulate=2)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every recording that was made."""
    found: list[int] = []
    record = graphs.record

    def counted(work: Any, pool: Any) -> Any:
        graph = record(work, pool)
        if isinstance(work.__self__, graphs._Step):
            found.append(1)
        return graph

    monkeypatch.setattr(graphs, "record", counted)
    return found


def trained(model: Any, spec: lc.LoraSpec, config: lc.TrainConfig = CONFIG, each: Any = None
            ) -> tuple[list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses of the steps and the updates that came out."""
    adapter, losses = lc.attach(model, spec), []
    for event in lc.train(adapter, TASK, config, tokenizer=tiny_tokenizer()):
        if event.kind == "step":
            losses.append(event.loss)
            if each:
                each(event.step)
    deltas = {k: d.dense().cpu() for k, d in adapter.deltas().items()}
    adapter.detach()
    return losses, deltas


SPECS: dict[str, dict[str, Any]] = {
    "q v": {}, "all": {"targets": ("q", "k", "v", "o", "gate", "up", "down")}, "dora": {"dora": True},
    "pissa": {"init": "pissa"}, "gates": {"mask": 0.01}, "embed": {"targets": ("q", "embed")}}  # fmt: skip


@gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recorded_steps_train_as_computed_ones(name: str, dtype: torch.dtype, recorded: list[int],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    model = tiny("llama", dtype=dtype).cuda()
    spec = lc.LoraSpec(rank=2, **SPECS[name])
    mine, deltas = trained(model, spec)
    assert recorded or name == "embed"
    monkeypatch.setattr(graphs, "MOST", 0)
    recorded.clear()
    want, wanted = trained(model, spec)
    assert not recorded
    close = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    assert mine == pytest.approx(want, rel=close)
    for key, d in deltas.items():
        assert float((d - wanted[key]).norm()) <= 10 * close * float(wanted[key].norm())


@gpu
def test_recorded_dropout_draws_anew_and_from_its_seed(recorded: list[int]) -> None:
    model = tiny("llama").cuda()
    spec = lc.LoraSpec(rank=2, dropout=0.5)
    first, again = trained(model, spec)[0], trained(model, spec)[0]
    assert recorded and first == pytest.approx(again, rel=1e-5)
    assert trained(model, spec, lc.TrainConfig(**{**CONFIG.to_dict(), "seed": 1}))[0] != pytest.approx(first, rel=1e-5)


@gpu
def test_what_changes_between_two_steps_acts(recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").cuda()
    seen: list[int] = []
    handles: list[Any] = []

    def change(step: int) -> None:
        if step == 6:
            next(iter(lc.get_adapter(model, "default")._factors.values())).scaling *= 8
        if step == 9:
            handles.append(model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1)))
        if step == 11:
            handles.pop().remove()

    mine = trained(model, lc.LoraSpec(rank=2), each=change)[0]
    assert recorded and len(seen) == 5  # two batches in each of two steps, and measuring once
    seen.clear()
    monkeypatch.setattr(graphs, "MOST", 0)
    assert trained(model, lc.LoraSpec(rank=2), each=change)[0] == pytest.approx(mine, rel=1e-3)


@gpu
def test_a_sweep_of_recorded_steps_is_as_alone(recorded: list[int]) -> None:
    model = tiny("llama", dtype=torch.float64).cuda()
    specs = {"a": lc.LoraSpec(rank=1), "b": lc.LoraSpec(rank=4, targets=("q", "o", "down")),
             "c": lc.LoraSpec(rank=2, init="pissa")}  # fmt: skip
    want = {n: trained(model, s) for n, s in specs.items()}
    recorded.clear()
    got: dict[str, list[Any]] = {n: [] for n in specs}
    for e in lc.sweep(model, specs, TASK, CONFIG, tokenizer=tiny_tokenizer()):
        if e.event.kind == "step":
            got[e.name].append(e.event.loss)
    assert recorded
    for name, (losses, deltas) in want.items():
        assert got[name] == pytest.approx(losses, rel=1e-6)
        for key, d in lc.get_adapter(model, name).deltas().items():
            torch.testing.assert_close(d.dense().cpu(), deltas[key], rtol=1e-5, atol=1e-8)


@gpu
def test_what_cannot_be_recorded_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").cuda()
    want = trained(model, lc.LoraSpec(rank=2))[0]
    losses_at = graphs.losses_at

    def looks(*args: Any) -> torch.Tensor:
        found = losses_at(*args)
        float(found.sum())  # waits for the GPU, which a recording cannot
        return found

    monkeypatch.setattr(graphs, "losses_at", looks)
    assert trained(model, lc.LoraSpec(rank=2))[0] == pytest.approx(want, rel=1e-3)
    assert torch.rand(3, device="cuda").unique().numel() == 3  # random numbers are as they were


@gpu
def test_old_recordings_are_in_nobody_s_way(recorded: list[int]) -> None:
    model = tiny("llama").cuda()
    for init in ("gaussian", "pissa", "gaussian"):
        found = trained(model, lc.LoraSpec(rank=2, init=init))[0]
        assert recorded and found[-1] < found[0]
        recorded.clear()
