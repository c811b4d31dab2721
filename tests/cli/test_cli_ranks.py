"""The command line of ranks: how much of them an adapter uses, and a smaller one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_kit import Call, only_json, short, wrong
from tests.model_folder import tiny_bert


def test_audit_and_compress(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "adapter", tmp_path / "cut"
    call(*short(tiny, rows, "--rank", 4, "--out", whole))
    status, printed, _ = call("audit", whole, "--json")
    value = only_json(printed)
    assert status == 0 and value["suggested_by"] == "spectrum" and value["model"] == str(tiny)
    assert value["suggested_rank"] == value["spectrum_rank"] and len(value["kept_energy"]) == 5
    assert len(value["matrices"]) == 4 == sum(value["words"].values()) and set(value["words"]) <= set(value["rules"])
    for m in value["matrices"]:
        assert set(m) >= {"path", "rank", "stable_rank", "energy_rank_90", "energy_rank_99", "mp_rank", "mp_edge",
                          "used", "word"}  # fmt: skip
        assert m["rank"] == 4 and 1 <= m["energy_rank_90"] <= m["energy_rank_99"] <= 4 and m["mp_rank"] <= 4
    k = value["suggested_rank"]

    status, printed, said = call("audit", whole, "--data", rows, "--json")
    value = only_json(printed)
    assert status == 0 and value["suggested_by"] == "loss" and value["spectrum_rank"] == k and value["rows"] == 40
    assert [c["rank"] for c in value["cuts"]][:3] == [0, 1, 2] and value["cuts"][-1]["rank"] == 4
    _, printed, _ = call("eval", whole, "--data", rows, "--score-rows", 0, "--json")
    losses = json.loads(printed)
    assert value["base"]["loss"] == value["cuts"][0]["loss"] == pytest.approx(losses["base"]["loss"], rel=1e-5)
    assert value["cuts"][-1]["loss"] == pytest.approx(losses["adapted"]["loss"], rel=1e-5)
    least = [c for c in value["cuts"] if value["base"]["loss"] - c["loss"] >= 0.99 * value["gain"]]
    assert value["suggested_rank"] == least[0]["rank"] and "cut to rank 2: loss" in said

    for size in (("--rank", 2), ("--energy", 0.9), ("--mb", 0.004)):
        status, printed, _ = call("compress", whole, *size, "--out", cut, "--json")
        value = only_json(printed)
        assert status == 0 and value["path"] == str(cut) and len(value["ranks"]) == 4
        assert value["file_bytes"] == (cut / "adapter_model.safetensors").stat().st_size < value["before_bytes"]
        assert value["difference"] == pytest.approx((1 - value["kept_energy"]) ** 0.5, abs=1e-4)
        assert size[0] != "--energy" or 0.9 <= value["kept_energy"] < 1
        assert size[0] != "--mb" or value["file_bytes"] <= 4000
        _, printed, _ = call("spectra", cut, "--json")
        assert {m["path"]: m["rank"] for m in only_json(printed)["matrices"]} == {
            key: n for key, n in value["ranks"].items() if n}  # fmt: skip
    status, printed, _ = call("eval", cut, "--data", rows, "--score-rows", 0, "--json")
    assert status == 0 and only_json(printed)["adapted"]["loss"] < losses["base"]["loss"]
    for command in (("audit", whole), ("audit", whole, "--data", rows, "--rows", 8),
                    ("compress", whole, "--rank", 1, "--out", cut)):  # fmt: skip
        status, printed, _ = call(*command)
        assert status == 0 and len(printed.splitlines()) > 3 and not printed.startswith("{")


def test_cuts_of_a_classifier_and_of_preferences(call: Call, tiny: Path, tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    labelled, pairs = tmp_path / "labelled.tsv", tmp_path / "pairs.jsonl"
    labelled.write_text("".join(f"{w} food {i} is {w}\t{name}\n" for i in range(20)
                                for name, w in (("good", "excellent"), ("bad", "amused"))))  # fmt: skip
    pairs.write_text("".join(json.dumps({"prompt": f"number {i}", "chosen": f"{i}", "rejected": f"Certainly! {i}"})
                             + "\n" for i in range(20)))  # fmt: skip
    for model, data, figure in ((bert, labelled, "accuracy"), (tiny, pairs, "preferred")):
        out = tmp_path / figure
        call("train", "--model", model, "--data", data, "--steps", 12, "--batch-size", 8, "--lr", 0.02, "--rank", 3,
             "--out", out)  # fmt: skip
        status, printed, said = call("audit", out, "--data", data, "--json")
        value = only_json(printed)
        assert status == 0, said
        _, printed, _ = call("eval", out, "--data", data, "--score-rows", 0, "--json")
        measured = json.loads(printed)
        assert value["cuts"][-1]["rank"] == 3 and value["gain"] > 0
        for name in ("loss", figure):
            assert value["cuts"][-1][name] == pytest.approx(measured["adapted"][name], rel=1e-4)
            assert value["base"][name] == pytest.approx(measured["base"][name], rel=1e-4)
        if figure == "preferred":  # each cut is compared with the model without it
            assert all(c["loss"] < value["base"]["loss"] for c in value["cuts"][1:])
        else:
            assert value["cuts"][0]["loss"] != value["base"]["loss"], "the head alone"
            status, printed, _ = call("compress", out, "--rank", 0, "--out", tmp_path / "head", "--json")
            assert status == 0 and set(only_json(printed)["ranks"].values()) == {0}
            _, printed, _ = call("eval", tmp_path / "head", "--data", data, "--json")
            assert only_json(printed)["adapted"]["loss"] == pytest.approx(value["cuts"][0]["loss"], rel=1e-4)


def test_what_is_wrong(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "adapter", tmp_path / "cut"
    call(*short(tiny, rows, "--out", whole))
    wrong(call("audit", tmp_path / "absent"), "no adapter at")
    wrong(call("audit", whole, "--data", rows, "--task", "restaurant"), "not both")
    wrong(call("audit", whole, "--task", "restaurnt"), "did you mean 'restaurant'")
    wrong(call("audit", whole, "--data", tmp_path / "absent.txt"), "absent.txt")
    wrong(call("audit", whole, "--rows", -1), "rows is -1")
    wrong(call("compress", whole, "--out", cut), "give one of rank, energy and mb: how much is kept; given none")
    wrong(call("compress", whole, "--out", cut, "--rank", 1, "--energy", 0.9), "given rank and energy")
    wrong(call("compress", whole, "--out", cut, "--energy", 95), "did you mean 0.95?")
    wrong(call("compress", whole, "--out", cut, "--mb", 0.0001), "takes 0.000")
    wrong(call("compress", whole, "--out", cut, "--rank", 0), "it is the base model")
    wrong(call("compress", whole, "--out", whole, "--rank", 1), "name another folder")
    wrong(call("compress", whole, "--rank", "many", "--out", cut), "Invalid value for '--rank'")
    wrong(call("compress", whole, "--rank", 1, "--out", rows / "in"), "cannot write to")
    wrong(call("compress", whole, "--rank", 1), "Missing option '--out'")
    assert not cut.exists()


def test_neither_needs_torch(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    call(*short(tiny, rows, "--out", tmp_path / "a"))
    for words in (["audit", str(tmp_path / "a")], ["compress", str(tmp_path / "a"), "--mb", "0.002", "--out",
                                                    str(tmp_path / "cut")]):  # fmt: skip
        code = ("import sys; from app import cli; status = cli.run([*sys.argv[1:], '--json']);"
                "assert status == 0 and not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        only_json(done.stdout)
