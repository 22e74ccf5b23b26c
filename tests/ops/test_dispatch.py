"""Dispatch: the ops' tables, what is forced, in which threads and tasks it holds, the environment."""

import contextvars
import os
from types import SimpleNamespace

import pytest
import torch

import hia_kernels
from hia_kernels import last_backend, use_backend
from hia_kernels.core import backend, native, registration, settings
from hia_kernels.core.backend import Backend, BackendTable
from tests.inputs import OPS, small_inputs
from tests.ops.harness import forward_backward

F32 = torch.float32


@pytest.fixture
def two_backends(monkeypatch):
    """Return a table with a fast row that takes small numbers only, and an unavailable one."""

    def too_large(function, x):
        return [f"{x} is larger than 9", "and that is too large"] if x > 9 else []

    rows = [
        Backend("cuda", {"double": lambda x: ("cuda", 2 * x)}, unavailable_reasons=lambda: ["no CUDA device"]),
        Backend("triton", {"double": lambda x: ("triton", 2 * x)}, unsupported_reasons=too_large),
        Backend("reference", {"double": lambda x: ("reference", 2 * x), "double_bwd": lambda x: ("reference", 2)}),
    ]
    table = BackendTable("double", rows)
    monkeypatch.setitem(backend.TABLES, "double", table)
    monkeypatch.delenv("HIA_BACKEND", raising=False)
    return table


def served(table, x, function="double"):
    """Return which row served the call, by its result."""
    return table.select(function, {"x": x})(x)[0]


class TestBackendChoice:
    def test_first_that_can_run(self, two_backends):
        def runs():
            assert last_backend("double") is None
            assert two_backends.select("double", {"x": 3})(3) == ("triton", 6)
            assert last_backend("double") == "triton"
            assert two_backends.select("double", {"x": 30})(30) == ("reference", 60)
            assert last_backend("double") == "reference"

        contextvars.copy_context().run(runs)
        assert last_backend("double") is None

    def test_forced_by_context_and_by_environment(self, two_backends, monkeypatch):
        with use_backend("reference"):
            assert served(two_backends, 3) == "reference"
            with use_backend("triton"):
                assert served(two_backends, 3) == "triton"
            assert backend.requested_backend() == "reference"
        assert backend.requested_backend() == "auto"
        monkeypatch.setenv("HIA_BACKEND", "reference")
        assert served(two_backends, 3) == "reference"
        with use_backend("triton"):  # stronger than the environment
            assert served(two_backends, 3) == "triton"

    def test_a_forced_backend_that_cannot_run_says_every_reason(self, two_backends):
        message = r"^hia::double: HIA_BACKEND=triton can't run this call: triton: 30 is larger than 9; triton: and that"
        with use_backend("triton"), pytest.raises(NotImplementedError, match=message):
            served(two_backends, 30)
        with use_backend("cuda"), pytest.raises(NotImplementedError, match=r"cuda: no CUDA device$"):
            served(two_backends, 3)
        two_backends.backends[2].functions["double_twice"] = lambda x: ("reference", 4 * x)
        with use_backend("triton"), pytest.raises(NotImplementedError, match=r"triton: has no double_twice$"):
            served(two_backends, 3, "double_twice")

    def test_an_op_without_the_row_and_a_gradient_it_does_not_compute_run_auto(self, two_backends, monkeypatch):
        monkeypatch.setitem(backend.TABLES, "other", BackendTable("other", [Backend("cublas", {})]))
        with use_backend("cublas"):
            assert served(two_backends, 3) == "triton" and served(two_backends, 30) == "reference"
            with pytest.raises(
                NotImplementedError, match="HIA_BACKEND=auto can't run this call: cuda: no CUDA device$"
            ):
                served(BackendTable("double", two_backends.backends[:1]), 3)
        with use_backend("triton"):
            assert served(two_backends, 3, "double_bwd") == "reference"

    def test_a_slower_row_is_passed_over_unless_forced(self, two_backends):
        def odd(function, x):
            return ["odd"] * (x % 2)

        quick = Backend("cublas", {"double": lambda x: ("cublas", 2 * x)})
        slower = Backend("triton", {"double": lambda x: ("triton", 2 * x)}, slower_reasons=odd)
        table = BackendTable("double", [slower, quick, two_backends.backends[-1]])
        assert served(table, 2) == "triton" and served(table, 3) == "cublas"
        assert last_backend("double") == "cublas"
        with use_backend("triton"):
            assert served(table, 3) == "triton"
        with pytest.raises(NotImplementedError, match="HIA_BACKEND=auto can't run this call: triton: odd$"):
            served(BackendTable("double", [slower]), 3)

    def test_what_runs_forced_alone(self, two_backends):
        """Force a row that takes the large parts of a call: it takes all of them."""
        parts, whole = ({"double": lambda x, how=how: (how, 2 * x)} for how in ("parts", "whole"))
        table = BackendTable("double", [Backend("triton", parts, forced_functions=whole)])
        assert served(table, 3) == "parts"
        with use_backend("triton"):
            assert served(table, 3) == "whole"
        with use_backend("cuda"):  # this table has no such row
            assert served(table, 3) == "parts"

    def test_asking_the_table_notes_nothing(self, two_backends):
        row, rejected = two_backends.find("double", {"x": 30})
        reasons = ["cuda: no CUDA device", "triton: 30 is larger than 9", "triton: and that is too large"]
        assert row.name == "reference" and rejected == reasons
        assert two_backends.find("double_twice", {"x": 3})[0] is None

        def last_after_asking():
            two_backends.find("double", {"x": 3})
            return last_backend("double")

        assert contextvars.Context().run(last_after_asking) is None

    def test_auto_lists_every_row_if_none_can_run(self, two_backends):
        only_fast = BackendTable("double", two_backends.backends[:2])
        message = "HIA_BACKEND=auto can't run this call: cuda: no CUDA device; triton: 30 is larger"
        with pytest.raises(NotImplementedError, match=message):
            served(only_fast, 30)

    def test_names_are_those_of_the_rows(self, two_backends, monkeypatch):
        # cuda: of the table above
        names = "auto, cpu, cublas, cuda, cudnn, flash_attn, native, reference, sdpa_efficient, sdpa_flash, triton"
        names += ", xformers"
        assert ", ".join(backend.backend_names()) == names
        message = f"^use_backend: name must be one of {names}, got 'mps'$"
        with pytest.raises(ValueError, match=message), use_backend("mps"):
            pass
        monkeypatch.setenv("HIA_BACKEND", "mps")
        with pytest.raises(ValueError, match=f"^HIA_BACKEND must be one of {names}, got 'mps'$"):
            served(two_backends, 3)
        with pytest.raises(ValueError, match=r"^last_backend: op must be one of .*stem, got 'steam'$"):
            last_backend("steam")

    @pytest.mark.parametrize(
        ("given", "name"),
        [("Reference", "reference"), (" AUTO ", "auto"), ("", "auto"), (" ", "auto"), ("TRITON", "triton")],
    )
    def test_case_and_blanks_do_not_count(self, given, name, two_backends, monkeypatch):
        with use_backend(given):
            assert backend.requested_backend() == name
        monkeypatch.setenv("HIA_BACKEND", given)
        assert backend.requested_backend() == name

    def test_leaving_by_an_exception_unforces(self):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert backend.requested_backend() == "auto"

    @pytest.mark.parametrize("op", OPS)
    def test_every_op_obeys(self, op, monkeypatch):
        function, inputs = getattr(hia_kernels, op), small_inputs(op, F32)

        def served_ops(call):
            def run():
                call()
                return {name: last_backend(name) for name in backend.TABLES if last_backend(name)}

            return contextvars.Context().run(run)

        assert set(served_ops(lambda: forward_backward(op, function, inputs))) == {op}
        with monkeypatch.context() as patch:
            patch.setenv("HIA_BACKEND", "reference")
            assert served_ops(lambda: forward_backward(op, function, inputs)) == {op: "reference"}
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        refusing = Backend("mps", {op: function}, unavailable_reasons=lambda: ["no such device"])
        monkeypatch.setattr(backend.TABLES[op], "backends", [refusing, *backend.TABLES[op].backends])
        monkeypatch.setenv("HIA_BACKEND", "mps")
        for call in (function, compiled):
            with pytest.raises(
                NotImplementedError, match=f"^hia::{op}: HIA_BACKEND=mps can't run this call: mps: no such"
            ):
                call(**inputs)

    def test_arguments_are_bound_by_the_schema(self):
        bound = registration.bind("row_softmax", ("scores", 2.0))
        assert bound == {"scores": "scores", "scale": 2.0, "out_dtype": None}
        assert registration.bind("row_softmax", ("scores",), {"scale": 2.0}) == bound
        assert list(registration.bind("stem_bwd", tuple(range(10))))[-2:] == ["output_mask", "out"]

    def test_reference_implementation(self):
        from hia_kernels.ops.stem.reference import stem_bwd_ref

        assert backend.reference_implementation(torch.ops.hia.stem_bwd.default) is stem_bwd_ref
        assert backend.reference_implementation(torch.ops.aten.mm.default) is None


class TestSettings:
    """Tests of environment variables: a value that is none of the choices raises and never means the default."""

    @pytest.mark.parametrize(
        ("name", "value", "choices"),
        [
            ("HIA_CPU_ISA", "AVX-2", "avx512, avx2, none"),
            ("HIA_CPU_ISA", "sse", "avx512, avx2, none"),
            ("HIA_DEBUG", "true", "0, 1"),
            ("HIA_TUNED", "off", "1, 0"),
        ],
    )
    def test_an_unknown_value_raises(self, name, value, choices, monkeypatch):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"^{name} must be one of {choices}, got '{value}'$"):
            settings.read(name)

    @pytest.mark.parametrize("name", settings.CHOICES)
    def test_every_choice_is_taken_and_empty_is_unset(self, name, monkeypatch):
        for value in settings.CHOICES[name]:
            for given in (value, value.upper(), f" {value} "):
                monkeypatch.setenv(name, given)
                assert settings.read(name) == value
        for empty in ("", "  "):
            monkeypatch.setenv(name, empty)
            assert settings.read(name) == settings.CHOICES[name][0]
        monkeypatch.delenv(name)
        assert settings.read(name) == settings.CHOICES[name][0]

    @pytest.mark.parametrize("op", OPS)
    def test_every_op_refuses_a_misspelt_cpu_isa(self, op, monkeypatch):
        monkeypatch.setenv("HIA_CPU_ISA", "AVX-2")
        with pytest.raises(ValueError, match="HIA_CPU_ISA must be one of avx512, avx2, none, got 'AVX-2'"):
            getattr(hia_kernels, op)(**small_inputs(op, F32))

    def test_none_turns_the_native_kernels_off(self, monkeypatch):
        monkeypatch.setenv("HIA_CPU_ISA", "none")
        assert native.cpu_unavailable_reasons() == ["HIA_CPU_ISA=none turns the native kernels off"]
        x, weight = torch.ones(1, 9, 9, 32), torch.ones(32, 32, 3, 3)
        hia_kernels.conv_norm_act(x, weight, torch.ones(32), torch.zeros(32))
        assert last_backend("conv_norm_act") != "native"

    def test_the_extension_reads_what_was_meant(self, monkeypatch):
        monkeypatch.setenv("HIA_CPU_ISA", " AVX2")
        seen = []
        extension = SimpleNamespace(cpu_isa=lambda: seen.append(os.environ["HIA_CPU_ISA"]) or "avx2")
        monkeypatch.setattr(native, "unavailable_reasons", tuple)
        monkeypatch.setattr(torch.ops, "hia_native", extension, raising=False)
        native._cpu_reasons.cache_clear()
        assert native.cpu_unavailable_reasons() == [] and seen == ["avx2"]
        assert os.environ["HIA_CPU_ISA"] == " AVX2"
        native._cpu_reasons.cache_clear()

    def test_instructions_that_are_not_there_are_an_error(self, monkeypatch):
        native._cpu_reasons.cache_clear()
        monkeypatch.setattr(native, "unavailable_reasons", tuple)
        monkeypatch.setattr(torch.ops, "hia_native", SimpleNamespace(cpu_isa=str), raising=False)
        monkeypatch.setenv("HIA_CPU_ISA", "avx512")
        with pytest.raises(RuntimeError, match="^HIA_CPU_ISA=avx512 asks for instructions that"):
            native.cpu_unavailable_reasons()
        monkeypatch.delenv("HIA_CPU_ISA")
        assert native.cpu_unavailable_reasons() == ["the native kernels need AVX2 and FMA, or AVX-512"]
        native._cpu_reasons.cache_clear()
