"""Dispatch by context: the thread, the task and the backward pass that a forced backend holds in."""

import asyncio
import contextvars
import threading

import pytest
import torch

import hia_kernels
from hia_kernels import last_backend, use_backend
from hia_kernels.core import backend
from hia_kernels.core.backend import Backend


def leave_an_ended_block():
    """End a block from another thread, which can't take it out of this context."""

    def suspended():
        with use_backend("cpu"):
            yield

    generator = suspended()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()


# PyTorch before 2.13 keeps no context of who called backward() for the threads that run it
knows_the_caller = pytest.mark.skipif(
    "_stash_obj_in_tls" not in torch.autograd.graph._engine_run_backward.__code__.co_names,
    reason="this PyTorch's threads don't know who called backward",
)


class TestContexts:
    """Tests that blocks, and what was served, belong to the thread or task; a backward pass, to the caller's."""

    @pytest.fixture(autouse=True)
    def nothing_forced(self, monkeypatch):
        monkeypatch.delenv("HIA_BACKEND", raising=False)

    def test_blocks_may_end_in_any_order(self):
        first, second, third = (use_backend(name) for name in ("reference", "cpu", "native"))
        for block in (first, second, third):
            block.__enter__()
        second.__exit__(None, None, None)
        assert backend.requested_backend() == "native"
        third.__exit__(None, None, None)
        assert backend.requested_backend() == "reference"
        first.__exit__(None, None, None)
        assert backend.requested_backend() == "auto"

    def test_equal_names_are_different_blocks(self):
        outer, inner = use_backend("cpu"), use_backend("cpu")
        outer.__enter__()
        with use_backend("reference"):
            inner.__enter__()
            outer.__exit__(None, None, None)
            assert backend.requested_backend() == "cpu"
            inner.__exit__(None, None, None)
            assert backend.requested_backend() == "reference"

    def test_a_generator_shares_its_callers_context(self):
        """Suspend a generator: its block holds for the caller meanwhile, and ends with it, whatever came since."""

        def steps():
            with use_backend("reference"):
                yield backend.requested_backend()
                yield backend.requested_backend()

        suspended = steps()
        assert next(suspended) == backend.requested_backend() == "reference"
        with use_backend("cpu"):
            assert next(suspended) == "cpu"  # the innermost in this context
            suspended.close()
            assert backend.requested_backend() == "cpu"
        assert backend.requested_backend() == "auto"
        apart = contextvars.copy_context()
        assert apart.run(next, steps()) == "reference" and backend.requested_backend() == "auto"

    def test_a_block_is_this_threads_alone(self):
        seen, entered, checked = [], threading.Event(), threading.Event()

        def other():
            with use_backend("cpu"):
                seen.append(backend.requested_backend())
                entered.set()
                checked.wait(10)
            seen.append(backend.requested_backend())

        with use_backend("reference"):
            thread = threading.Thread(target=other)
            thread.start()
            assert entered.wait(10) and backend.requested_backend() == "reference"
        assert backend.requested_backend() == "auto"
        checked.set()
        thread.join()
        assert seen == ["cpu", "auto"]

    def test_threads_have_their_own_last_backend(self):
        x, seen = torch.ones(2, 3), []

        def other():
            seen.append(last_backend("linear"))
            with use_backend("reference"):
                hia_kernels.linear(x, x)
            seen.append(last_backend("linear"))

        hia_kernels.linear(x, x)
        before = last_backend("linear")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [None, "reference"] and last_backend("linear") == before == "cpu"

    def test_tasks_do_not_see_each_other(self):
        x = torch.ones(2, 3)

        async def call(name):
            with use_backend(name):
                await asyncio.sleep(0)
                assert backend.requested_backend() == name
                hia_kernels.linear(x, x)
                await asyncio.sleep(0)
                return last_backend("linear")

        async def both():
            hia_kernels.linear(x, x)
            found = await asyncio.gather(call("reference"), call("cpu"))
            return found, backend.requested_backend()

        assert asyncio.run(both()) == (["reference", "cpu"], "auto")

    def test_what_is_begun_inside_keeps_the_block_after_it(self):
        """A task, a worker thread and a copied context hold what was forced where they began."""
        seen, left = [], threading.Event()

        async def task(after):
            seen.append(backend.requested_backend())
            await after.wait()
            seen.append(backend.requested_backend())

        def work():
            left.wait(10)
            return backend.requested_backend()

        async def run():
            after = asyncio.Event()
            with use_backend("reference"):
                begun = asyncio.create_task(task(after))
                thread = asyncio.create_task(asyncio.to_thread(work))
                await asyncio.sleep(0)
                later = asyncio.create_task(task(after))  # whose first step comes after the block
            assert backend.requested_backend() == "auto"
            after.set()
            left.set()
            await asyncio.gather(begun, later)
            return await thread

        assert asyncio.run(run()) == "reference" and seen == ["reference"] * 4
        with use_backend("reference"):
            copied = contextvars.copy_context()
        assert copied.run(backend.requested_backend) == "reference"

    def test_ended_blocks_are_dropped(self):
        """Close generators on other threads: what they held here is cleared away by the next block."""

        def many():
            for _ in range(5):
                leave_an_ended_block()
                assert backend.requested_backend() == "auto"
            return len(backend._blocks.get())

        assert contextvars.Context().run(many) == 1

    def test_gradients_of_a_forced_call_are_forced(self):
        x = torch.ones(2, 3, requires_grad=True)
        with use_backend("reference"):
            out = hia_kernels.linear(x, x)
        free = hia_kernels.linear(x, x)
        out.sum().backward()
        assert last_backend("linear") == "reference"
        free.sum().backward()
        assert last_backend("linear") == "cpu"

    def test_the_block_around_backward_decides(self):
        x = torch.ones(2, 3, requires_grad=True)
        with use_backend("reference"):
            out = hia_kernels.linear(x, x)
        with use_backend("auto"):
            out.sum().backward()
            assert last_backend("linear") == "cpu"
        free = hia_kernels.linear(x, x)
        with use_backend("reference"):
            free.sum().backward()
            assert last_backend("linear") == "reference"

    def test_gradients_that_the_forced_row_does_not_compute_are_autos(self, monkeypatch):
        table = backend.TABLES["linear"]
        mute = Backend("mps", {"linear": table.row("reference").functions["linear"]})
        monkeypatch.setattr(table, "backends", [mute, *table.backends])
        x = torch.ones(2, 3, requires_grad=True)
        with use_backend("mps"):
            out = hia_kernels.linear(x, x)
            assert last_backend("linear") == "mps"
            out.sum().backward()
        assert last_backend("linear") == "cpu"

    @knows_the_caller
    @pytest.mark.parametrize("before", [lambda: None, leave_an_ended_block], ids=["fresh", "after an ended block"])
    def test_on_a_thread_of_autograd(self, before):
        """See a context of its own on PyTorch's own thread, and the one that ``backward`` was called from."""
        x, seen, own = torch.ones(2, 3, requires_grad=True), [], contextvars.Context()
        own.run(before)

        class Elsewhere(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dout):
                return own.run(self.on_the_thread, dout, seen)

        with use_backend("cpu"):
            hia_kernels.linear(x.detach(), x.detach())
            out = Elsewhere.apply(x)
        with use_backend("reference"):
            out.sum().backward()
        assert seen == ["reference"] and last_backend("linear") == "reference"
        assert backend.requested_backend() == "auto"

    @staticmethod
    def on_the_thread(dout, seen):
        seen.append(backend.requested_backend())
        hia_kernels.linear(dout, dout)
        return dout

    @knows_the_caller
    @pytest.mark.gpu
    def test_gradients_on_a_gpu(self):
        x = torch.ones(2, 3, requires_grad=True, device="cuda")
        with use_backend("reference"):
            out = hia_kernels.linear(x, x)
        hia_kernels.linear(x, x)
        assert last_backend("linear") == "cublas"
        out.sum().backward()
        assert last_backend("linear") == "reference"
        out = hia_kernels.linear(x, x)
        with use_backend("reference"):
            out.sum().backward()
        assert last_backend("linear") == "reference"
        compiled = torch.compile(hia_kernels.linear, backend="aot_eager", fullgraph=True)
        out = compiled(x, x)
        assert last_backend("linear") == "cublas"
        with use_backend("reference"):
            out.sum().backward()
        assert last_backend("linear") == "reference"

    def test_a_compiled_backward_follows_the_call_of_backward(self):
        x = torch.ones(2, 3, requires_grad=True)
        compiled = torch.compile(hia_kernels.linear, backend="aot_eager", fullgraph=True)
        out = compiled(x, x)
        assert last_backend("linear") == "cpu"
        with use_backend("reference"):
            out.sum().backward()
        assert last_backend("linear") == "reference"

    def test_a_block_inside_a_compiled_function(self):
        """Break the graph, so that the block holds; where no break is allowed it is an error."""

        def forced(x):
            with use_backend("reference"):
                return hia_kernels.linear(x, x)

        x = torch.ones(2, 3)
        hia_kernels.linear(x, x)
        torch._dynamo.reset()
        for _ in range(2):
            torch.compile(forced, backend="eager")(x)
            assert last_backend("linear") == "reference"
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(forced, backend="eager", fullgraph=True)(x)
        assert backend.requested_backend() == "auto"

    def test_a_generator_closed_in_another_thread_ends_its_block(self):
        leave_an_ended_block()
        assert backend.requested_backend() == "auto"
