"""The plan: bytes by storage, FLOPs by hand, predictions against real tensors, ways that fit or not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fixtures.vla_training import MODEL, SPEC
from tutti.config.run_config import RunConfig, build_config
from tutti.models.config import ModelConfig
from tutti.planning import devices
from tutti.planning import plan as planning
from tutti.planning.devices import CPU_PROCESS, DEVICES, device_of_card, find_device
from tutti.planning.footprint import (
    Flops,
    LiveMemory,
    Parts,
    Peaks,
    TrialUpdate,
    count_flops,
    dummy_batch,
    fake_update,
    recompute,
)
from tutti.planning.plan import (
    DAY,
    Memory,
    Request,
    exposed_seconds,
    make_plan,
    memory_on,
    plan_run,
    sent_bytes,
)
from tutti.planning.report import TIMES, in_bytes, plain, print_plan, scaled
from tutti.runs import terminal
from tutti.types import DataNeeds, DataSpec, UserError

SMALL: dict[str, Any] = {
    "model": MODEL,
    "data": {"batch_size": 8},
    "objective": {"align": {"weight": 0.1}, "recon": None, "state": None},
    "training": {"steps": 100, "schedule": {"warmup": 5}, "precision": "fp32"},
}


def config(**changes: Any) -> RunConfig:
    return build_config(SMALL | changes, "a test")


MUON = SMALL["training"] | {"optimizer": {"kind": "muon"}}


def request(gpus: int = 1, *, samples: float = 800.0, mfu: float = 0.4, **device: Any) -> Request:
    return Request(gpus=gpus, device=replace(DEVICES["h100"], **device), mfu=mfu, samples=samples)


def test_a_storage_counts_once_while_it_lives() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100)
        assert memory.live == 4000
        c = a + 1
        assert (memory.live, memory.peak) == (8000, 8000)
        del a, b
        assert memory.live == 4000
        c.mul_(2)
        d = c.double()  # 8,000 bytes
        assert (memory.live, memory.peak) == (12000, 12000)
        del c, d
        assert (memory.live, memory.peak) == (0, 12000)
        memory.restart()
        assert memory.peak == 0


@pytest.mark.parametrize(("optimizer", "again"), [("adamw", "off"), ("muon", "block")])
def test_fake_tensors_predict_the_peak_of_real_ones(optimizer: str, again: str) -> None:
    training = SMALL["training"] | {"optimizer": {"kind": optimizer}, "activation_checkpointing": again}
    own = config(training=training)
    with fake_update(own, SPEC) as (trial, memory):
        predicted, parts = trial.peaks(memory, 6), trial.parts()
    with LiveMemory() as memory:
        real = TrialUpdate(own, SPEC)
        measured = real.peaks(memory, 6)
    assert predicted.passes == pytest.approx(measured.passes, rel=0.1)
    assert predicted.step == pytest.approx(measured.step, rel=0.01)
    assert parts == real.parts()
    assert parts.weights == 4 * parts.total  # an objective of weights has no buffers of its own
    assert parts.gradients == 4 * parts.trainable == 4 * parts.total
    assert parts.ema == parts.weights
    if optimizer == "adamw":  # two moments each, and its count of steps
        assert parts.optimizer == 8 * parts.total + 4 * len(real.state.parameters)
    assert parts.block + parts.outside < parts.total


def test_on_a_gpu_in_bf16_layer_norms_keep_float32() -> None:
    """As CUDA casts them: only those of the stem are given bf16, each number of which costs more. What is
    computed again is cast as it was."""
    own = config(training=SMALL["training"] | {"precision": "bf16", "activation_checkpointing": "block"})
    passes: list[int] = []
    for gpu in (False, True):
        with fake_update(own, SPEC, gpu=gpu) as (trial, memory):
            few, many = (trial.peaks(memory, size).passes for size in (16, 32))
            stem = trial.model.vision.get_submodule("stem")
            passes.append(many - few)
    edge, maps = SPEC.image_size // 4, 0
    for layer in stem.children():
        edge //= layer.conv.stride[0]
        maps += layer.conv.out_channels * edge**2
    numbers = 16 * len(SPEC.views) * maps  # of 16 samples more
    assert 4 * numbers <= passes[1] - passes[0] <= 10 * numbers


def test_a_residual_sum_in_bf16_takes_less_and_can_be_computed_again() -> None:
    bf16 = SMALL["training"] | {"precision": "bf16"}
    passes: list[int] = []
    for residual in ("fp32", "bf16"):
        own = config(
            training=bf16 | {"residual": residual}, model=MODEL | {"fusion": {"width": 32, "depth": 6}}
        )
        with fake_update(own, SPEC, gpu=True) as (trial, memory):
            passes.append(trial.peaks(memory, 16).passes)
            recompute(trial, True)
            assert trial.peaks(memory, 16).passes < passes[-1]
    assert passes[1] < passes[0]


def test_more_samples_and_no_recomputation_need_more() -> None:
    deep = config(model=MODEL | {"fusion": {"width": 32, "depth": 3}})
    with fake_update(deep, SPEC) as (trial, memory):
        few, many = trial.peaks(memory, 4), trial.peaks(memory, 16)
        recompute(trial, True)
        less = trial.peaks(memory, 16)
    assert few.passes < less.passes < many.passes
    assert few.step < many.step == less.step  # the batch itself lives through the step


@pytest.fixture(scope="module")
def flops() -> Flops:
    return count_flops(config(), SPEC)


@pytest.fixture(scope="module")
def muon_flops() -> Flops:
    return count_flops(config(training=MUON), SPEC, gpu=True)


def test_muon_takes_more_flops_on_a_gpu_where_it_iterates_in_bfloat16(muon_flops: Flops) -> None:
    cpu = count_flops(config(training=MUON), SPEC)
    assert muon_flops.optimizer > 1.05 * cpu.optimizer > 0 and muon_flops.model == cpu.model


def test_fsdp_divides_muons_work(muon_flops: Flops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "count_flops", lambda *given, gpu: muon_flops)
    monkeypatch.setattr(
        planning, "_measured", lambda *given, **sizes: (PARTS, {False: PEAKS, True: LESS}, 7, 0)
    )
    ways = {way.name: way for way in make_plan(config(training=MUON), SPEC, request(gpus=4)).ways}
    optimizer = muon_flops.optimizer / (DEVICES["h100"].fp32 * 0.4)
    saved = ways["ddp"].compute_seconds - ways["fsdp"].compute_seconds
    assert 0.75 * optimizer < saved < 0.75 * optimizer + 1e-4  # and the weights that are read and written


def test_muons_share_is_told_and_the_batch_from_which_on_it_is_small(
    by_hand: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.4 GFLOP an update beside 3 a sample: 11.8 % of one sample's update, 5 % of one of three."""
    for batch, share in ((1, "11.8 %"), (3, "4.3 %")):
        plan = make_plan(config(data={"batch_size": batch}), SPEC, request())
        print_plan(plan)
        shown = capsys.readouterr().out
        assert share in shown
        assert ("% at 3 samples an update" in " ".join(shown.split())) == (batch == 1)


def test_flops_of_a_linear_model_are_two_for_each_multiply_add(flops: Flops) -> None:
    assert 0 < flops.recomputed < flops.forward
    assert flops.model == flops.hardware(recompute=False) < flops.hardware(recompute=True)
    assert 1.5 * flops.forward < flops.backward < 2.05 * flops.forward
    wider = config(model=MODEL | {"action": {"hidden": 64}})
    more = count_flops(wider, SPEC).forward - flops.forward
    readout, out = 32, SPEC.horizon * SPEC.action_dim
    assert more == 2 * (readout * 32 + 32 * out)  # 32 hidden units more, by hand


PARTS = Parts(
    parameters={"vision": 60, "fusion": 40},
    **{"trainable": 100, "block": 20, "outside": 10},
    **{"weights": 400, "gradients": 400, "optimizer": 800, "ema": 400},
)
PEAKS = (Peaks(size=4, passes=2400, step=2100), Peaks(size=8, passes=3200, step=2100))
LESS = (Peaks(size=4, passes=2000, step=2100), Peaks(size=8, passes=2400, step=2100))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 parameters that takes 1,600 + 200 b bytes (recomputed 100 b), 3 GFLOP a sample."""
    flops = Flops(forward=1e9, backward=2e9, recomputed=6e8, optimizer=4e8)
    monkeypatch.setattr(planning, "count_flops", lambda *given, gpu: flops)
    monkeypatch.setattr(
        planning, "_measured", lambda *given, **sizes: (PARTS, {False: PEAKS, True: LESS}, 7, 0)
    )


def test_ways_that_send_and_hold_by_hand() -> None:
    parts, peaks = PARTS, PEAKS
    assert (parts.total, parts.fixed) == (100, 2000)
    single = memory_on("single", 1, parts, peaks, config())
    assert single == Memory(constant=1600.0, sample=200.0, step=2100.0)
    assert (single.at(1), single.at(10)) == (2100, 3600)
    assert [single.largest(room) for room in (3600.0, 3599.0, 2099.0)] == [10, 9, 0]
    ddp = memory_on("ddp", 4, parts, peaks, config())
    assert ddp == Memory(constant=2000.0, sample=200.0, step=2500.0)
    fsdp = memory_on("fsdp", 4, parts, peaks, config())
    # (1600 / 4) and 4 bytes for 10 outside + 2 blocks of 20, and a block's gradient; 2000 / 4 and 100 / 4
    assert fsdp == Memory(constant=400.0 + 4 * 50 + 4 * 20, sample=200.0, step=525.0)
    bf16 = SMALL["training"] | {"precision": "bf16", "parallel": {"kind": "fsdp", "communication": "bf16"}}
    low = memory_on("fsdp", 4, parts, peaks, config(training=bf16))
    # without the casts of 100 weights, but at least what lives; weights on their way have 2 bytes
    assert low.constant == max(1600 - 200, 1600) / 4 + 2 * 50 + 4 * 20
    assert sent_bytes("ddp", 4, parts, width=4, micro_batches=3) == 2 * 0.75 * 400
    assert sent_bytes("fsdp", 4, parts, width=4, micro_batches=1) == 0.75 * (2 * 400 + 400)
    assert sent_bytes("fsdp", 4, parts, width=2, micro_batches=3) == 0.75 * (2 * 3 * 200 + 400)
    assert sent_bytes("single", 1, parts, width=4, micro_batches=1) == 0
    assert [exposed_seconds(kind, 1.0, 0.9) for kind in ("ddp", "fsdp")] == pytest.approx([0.4, 0.1])


@pytest.mark.usefixtures("by_hand")
def test_what_a_process_holds_beside_its_tensors_takes_room_and_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(config(), SPEC, request(memory=4000.0 / 0.92, process=400.0))
    beside = plan.ways[0].memory
    assert beside == Memory(constant=1600.0, sample=200.0, step=2100.0, process=400.0)
    assert plan.ways[0].peak == beside.at(8) == 1600 + 8 * 200 + 400
    # 400 of the room, and of the step's 2,100
    assert [beside.largest(room) for room in (4000.0, 2500.0, 2499.0)] == [10, 2, 0]
    monkeypatch.setattr(terminal.console, "_width", 140)
    print_plan(replace(plan, request=request(process=12.5e6)))
    shown = " ".join(capsys.readouterr().out.split())
    assert "12.5 MB of the process" in shown and "On a CPU malloc may keep freed tensors" in shown
    print_plan(replace(plan, request=request()))
    assert "malloc" not in capsys.readouterr().out
    found = plain(plan)
    assert found["request"]["device"]["process"] == found["ways"][0]["memory"]["process"] == 400


@pytest.mark.usefixtures("by_hand")
def test_a_cpu_holds_what_was_measured_and_a_gpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "expected_spec", lambda given: SPEC)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "product_rate", lambda *given: 1e11)  # large products take seconds
    low = config(training=SMALL["training"] | {"precision": "bf16"})
    measured = [plan_run(one, gpus=1, device="measured").request.device for one in (config(), low)]
    assert [one.process for one in measured] == [CPU_PROCESS["fp32"], CPU_PROCESS["bf16"]]
    assert plan_run(low, gpus=1).request.device.process == 0


def test_a_plan_names_what_fits_and_how_long_it_takes(flops: Flops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "count_flops", lambda *given, gpu: flops)
    plan = make_plan(config(), SPEC, request(gpus=4))
    names = ["single", "single + recompute", "ddp", "ddp + recompute", "fsdp", "fsdp + recompute"]
    assert [way.name for way in plan.ways] == names
    assert plan.steps == 100 and plan.global_batch == 8
    for way in plan.ways:
        assert way.rows * way.micro_batches * way.gpus == 8
        assert way.days == pytest.approx(100 * way.step_seconds / 86400)
    single = plan.ways[0]
    least = (8 * flops.model + flops.optimizer) / (DEVICES["h100"].fp32 * 0.4)
    assert least < single.compute_seconds < least + 1e-4
    assert not any(way.why_not for way in plan.ways)


@pytest.mark.usefixtures("by_hand")
def test_what_does_not_fit_says_why_and_takes_for_ever() -> None:
    plan = make_plan(config(), SPEC, request(gpus=16, memory=1000.0))
    single, ddp = plan.ways[0], plan.ways[2]
    assert "GB for one sample" in single.why_not and math.isinf(single.days)
    assert "smaller than the number of GPUs" in ddp.why_not
    found = json.loads(json.dumps(plain(plan), allow_nan=False))
    assert found["ways"][0]["days"] is None and found["ways"][0]["name"] == "single"


@pytest.mark.usefixtures("by_hand")
def test_too_large_a_batch_is_cut_into_micro_batches() -> None:
    ways = make_plan(config(), SPEC, request(memory=2400.0 / 0.92)).ways
    assert [(way.largest, way.micro_batches, way.rows) for way in ways] == [(4, 2, 4), (8, 1, 8)]
    assert [way.peak for way in ways] == [2400, 2400]
    rate = DEVICES["h100"].fp32 * 0.4
    moved = (400 + 2 * (400 + 800 + 400)) / DEVICES["h100"].memory_bandwidth
    assert ways[0].step_seconds == pytest.approx((8 * 3e9 + 4e8) / rate + moved)
    assert ways[1].step_seconds == pytest.approx((8 * 3.6e9 + 4e8) / rate + moved)


@pytest.mark.usefixtures("by_hand")
def test_with_several_micro_batches_fsdp_holds_whole_gradients() -> None:
    roomy = make_plan(config(), SPEC, request(gpus=2)).ways[4]
    assert (roomy.kind, roomy.micro_batches, roomy.rows) == ("fsdp", 1, 4)
    assert roomy.memory.constant == 1600 / 2 + 4 * 50 + 4 * 20
    tight = make_plan(config(), SPEC, request(gpus=2, memory=1700.0 / 0.92)).ways[4]
    assert tight.memory.constant == roomy.memory.constant + 400 / 2
    assert (tight.largest, tight.micro_batches, tight.rows) == (2, 2, 2)
    assert tight.sent == 0.5 * (2 * 2 * 400 + 400)


@pytest.mark.usefixtures("by_hand")
def test_gpus_that_do_not_divide_the_batch_are_no_way_to_train() -> None:
    """`tutti train` refuses them."""
    single, _, *several = make_plan(config(), SPEC, request(gpus=3)).ways
    assert not single.why_not and all("8 cannot be shared out evenly" in way.why_not for way in several)


def test_no_time_or_size_is_too_small_for_its_unit() -> None:
    times = {4.2e-5: "42 us", 0.0031: "3.1 ms", 0.51: "510 ms", 71.9: "1.2 min", 312 * DAY: "312 days"}
    assert {seconds: scaled(seconds, TIMES) for seconds in times} == times
    sizes = {0.0: "0 B", 8.41e6: "8.41 MB", 999.9: "1,000 B", 7.31e10: "73.1 GB"}
    assert {size: in_bytes(size) for size in sizes} == sizes


@pytest.mark.usefixtures("by_hand")
def test_the_table_and_the_json_hold_every_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.console, "_width", 80)
    plan = make_plan(config(), SPEC, request(gpus=2))
    print_plan(plan)
    shown = capsys.readouterr().out
    assert all(way.kind in shown for way in plan.ways) and "…" not in shown
    assert shown.count("  recomputed ") == sum(way.recompute for way in plan.ways)
    print_plan(plan, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["ways"]) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "--gpus is 0"),
        ({"mfu": 1.5}, "--mfu is 1.5"),
        ({"memory": 0.0}, "--memory is 0"),
        ({"memory": -5e9}, "--memory is -5; give a number of at least"),
        ({"samples": math.inf}, "samples is inf"),
        ({"samples": math.nan}, "samples is nan"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        request(**changes)


def test_devices_are_found_by_name_and_by_what_cuda_calls_them() -> None:
    assert find_device("h200", "bf16").memory == 141e9
    cards = {"H100 80GB HBM3": "h100", "GeForce RTX 4090": "rtx4090", "H100 PCIe": "h100pcie"}
    for card, name in cards.items():
        assert device_of_card(f"NVIDIA {card}") is DEVICES[name]
    assert device_of_card("Unheard Of") is None
    with pytest.raises(UserError, match="--device h99: unknown"):
        find_device("h99", "bf16")


@pytest.mark.usefixtures("by_hand")
def test_the_samples_are_episodes_times_frames_or_those_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "expected_spec", lambda given: SPEC)
    told = plan_run(config(), gpus=1, episodes=10.0, frames=200.0, memory=40.0, mfu=0.3).request
    assert (told.samples, told.device.memory, told.bandwidth, told.mfu) == (2000, 40e9, 450e9, 0.3)
    steps = plan_run(config(), gpus=16).request
    assert (steps.samples, steps.device.memory, steps.bandwidth, steps.mfu) == (800, 80e9, 50e9, 0.4)


def test_no_two_texts_of_a_dummy_batch_are_the_same() -> None:
    batch = dummy_batch(SPEC, 50, DataNeeds(futures=(4,), states=(1, "last")))
    assert len(torch.unique(batch.observation.text, dim=0)) == 50
    assert batch.later_states is not None and batch.later_states.values.shape == (50, 2, SPEC.state_dim)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 1.0), ("small", 28.0), ("base", 100.0), ("large", 500.0)]
)
def test_presets_have_the_sizes_that_they_claim(size: Any, millions: float) -> None:
    spec = DataSpec(
        **{"views": ("a", "b"), "image_size": 64, "state_dim": 4, "action_dim": 4, "horizon": 8},
        **{"vocab_size": 128, "text_length": 12, "embodiments": ("sawyer",), "fps": 20.0},
    )
    with torch.device("meta"):
        model = ModelConfig(size=size).build(spec)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)
