"""A device's results, all made up, for the tests of what is made of results."""

from __future__ import annotations

import json

from bench import __main__ as bench
from bench.records.record import Measurement, write_records

ENVIRONMENT = {
    "device": "made-up CPU",
    "threads": 2,
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-01",
    "command": "python -m bench ops --device cpu",
    "limits": {"bandwidth_gb_per_s": 20.0, "gemm_gflop_per_s": {"fp32": 500.0}},
}
PROVIDERS = {"hia": 1.0, "eager": 2.0, "compile": 0.5}
TARGETS = [
    {
        "name": "encode-896",
        "kind": "speedup",
        "where": "encode px896 forward",
        "target": 2.5,
        "ratio": 2.75,
        "verdict": "met",
        "note": "hia 4 ms, eager 11 ms",
    },
    {
        "name": "stem-16bit-memory",
        "kind": "peak",
        "where": "stem px2048-16bit forward",
        "target": 0.25,
        "ratio": 0.5,
        "verdict": "MISSED",
        "note": "hia 50 MB, eager_rgb 100 MB",
    },
    {
        "name": "encode-2048-compile",
        "kind": "speedup",
        "where": "encode px2048 forward",
        "target": 1.3,
        "ratio": None,
        "verdict": "not measured",
        "note": "compile: a <b>made-up</b> | reason",
    },
]


def measurement(op="stem", case="13b-448-2img", provider="hia", p50=1.0, **more) -> Measurement:
    fields = {
        "p20_ms": 0.9 * p50,
        "p50_ms": p50,
        "p80_ms": 1.1 * p50,
        "repeats": 9,
        "flops": 10**9,
        "bytes": 10**7,
        "roofline_ms": 0.1,
        "percent_of_roofline": 10 / p50,
        "peak_bytes": 10**6,
    }
    fields["environment"] = ENVIRONMENT
    return Measurement("op", op, case, provider, "forward", "fp32", "cpu", "ok", **{**fields, **more})


def records() -> list[Measurement]:
    found = [
        measurement(op, f"13b-{side}-2img", provider, factor * side / 448)
        for op in ("stem", "norm_linear")
        for side in (448, 896, 1792)
        for provider, factor in PROVIDERS.items()
    ]
    found.append(
        Measurement(
            "op",
            "stem",
            "13b-448-2img",
            "flash_attn",
            "forward",
            "fp32",
            "cpu",
            "failed",
            "output: <script>alert(1)</script> | rel-RMS 1.0 > 1e-6",
            environment=ENVIRONMENT,
        )
    )
    whole = {"host": "small", "resolution": 896, "batch": 1, "total_bytes": 2 * 10**9, "tokens_per_s": 12.5}
    found += [
        Measurement(
            "end_to_end",
            "decode",
            "896px-2img-b1",
            provider,
            "forward",
            "fp32",
            "cpu",
            "ok",
            None,
            70.0,
            80.0,
            90.0,
            repeats=3,
            peak_bytes=10**8,
            extra=whole,
            environment=ENVIRONMENT,
        )
        for provider in ("hia", "baseline")
    ]
    return found


def write_results(folder):
    """Write a device's folder."""
    all_of_them = records()
    write_records(folder / "kernels.json", [r for r in all_of_them if r.level == "op"])
    write_records(folder / "end_to_end.json", [r for r in all_of_them if r.level == "end_to_end"])
    row = {
        "resolution": 896,
        "method": "hia",
        "attention": "sdpa",
        "flops": 33 * 10**12,
        "memory_bytes": 29 * 10**9,
        "fits": True,
        "paper_flops_t": 16.8,
        "paper_memory_gb": 30.4,
        "paper_out_of_memory": False,
        "tokens": 1212,
    }
    table3 = {
        "environment": {**ENVIRONMENT, "command": "python -m bench table3"},
        "protocol": {
            "dtype": "bf16",
            "attention": ["sdpa"],
            "card_gb": 32.0,
            "unit": "flops",
            "images_per_sample": 2,
            "text_tokens": 60,
            "host": {"name": "a host"},
        },
        "rows": [
            row,
            {**row, "method": "baseline", "fits": False, "paper_memory_gb": None, "paper_out_of_memory": True},
        ],
    }
    (folder / "table3.json").write_text(json.dumps(table3))
    judged = {**ENVIRONMENT, "command": "python -m bench targets", "commit": "fedcba9876543210", "dirty": False}
    write_records(folder / "targets.json", [measurement("encode", "px896", environment=judged)], targets=TARGETS)


def run(*arguments) -> int:
    """Run the command."""
    return bench.main(["report", *map(str, arguments)])
