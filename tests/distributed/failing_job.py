"""What the ranks of `failing_ranks` run: a small model under a FlexModel, and one fault.

Run as a program this is a nursery: it imports torch once and forks a process for every rank that it
is told of on its standard input. A fork leaves the nursery's loop and is from then on a program as
any other: what is not caught ends it with code 1, by way of the interpreter's own end.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

_QUICK: list[bool] = []


@atexit.register  # before flex_model does: run last, when all has been said
def _end_at_once() -> None:
    """Taking the interpreter apart costs a fork more than its job; ranks of four leave it out."""
    if _QUICK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if hasattr(sys, "last_value") else 0)


from flex_model import FlexModel, HookFunction  # noqa: E402
from flex_model.errors import EditError, FlexModelError, RankFailedError  # noqa: E402

WIDTH, INNER, TOKENS, BATCH = 6, 8, 5, 4
# Time for the others to come to where they wait for the rank that fails.
AHEAD = 0.3
PATIENCE = 2.0


class Mlp(nn.Module):
    """``x + down(act(up(norm(x))))``: over tp an all-reduce of the framework's ends each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.act = nn.GELU()
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Layers(nn.Sequential):
    """Two layers, in an order that a rank may leave, as control flow on its own data would."""

    def __init__(self) -> None:
        super().__init__(Mlp(), Mlp())
        self.order = [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self[index](x)
        return x

    def generate(self, x: Tensor) -> Tensor:
        """Calls the model past any wrapper, as transformers' ``generate`` does."""
        return self(x)


class Job:
    """One rank's part: the process group, the model, and when the fault came."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.rank: int = told["rank"]
        self.world: int = told["world"]
        self.layout: str = told["layout"]
        self.folder = Path(told["folder"])
        self.faulty = self.rank == self.world - 1
        self.port: int = told["port"]
        self.start()

    def start(self, name: str = "job", host: bool = False) -> None:
        store = dist.TCPStore("127.0.0.1", self.port, is_master=host, wait_for_workers=False)
        timeout = timedelta(seconds=100)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=self.rank,
            world_size=self.world,
            timeout=timeout,
        )

    def flex(self, *hooks: HookFunction, **options: Any) -> FlexModel:
        """The model on the job's mesh, with forward hooks."""
        torch.manual_seed(0)
        sizes = {"tp": (1, 2), "dp": (2, 1), "2x2": (2, 2)}[self.layout]
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
        model = Layers()
        if sizes[1] > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            for layer in model:
                parallelize_module(layer, mesh["tp"], plan)
        flex = FlexModel(model, {}, mesh=mesh, **{"patience": 60.0, **options})
        for hook in hooks:
            flex.register_forward_hook(hook)
        return flex

    def fault(self) -> None:
        """Stamp the time: the fault comes now."""
        (self.folder / "fault").write_text(repr(time.time()))

    def tell(self, error: BaseException) -> None:
        """Write down what ended this rank."""
        told = {
            "kind": type(error).__name__,
            "named": isinstance(error, FlexModelError),
            "message": str(error),
            "notes": list(getattr(error, "__notes__", [])),
            "time": time.time(),
        }
        file = self.folder / f"{self.rank}.part"
        file.write_text(json.dumps(told))
        file.rename(self.folder / f"{self.rank}.json")


def batch() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH).requires_grad_()


def train(flex: nn.Module, steps: int = 1) -> None:
    """Forward, backward, and the all-reduce of gradients that data parallelism makes."""
    for _ in range(steps):
        flex(batch()).sum().backward()
        dist.all_reduce(torch.ones(1))


def keep(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * 1.0


def hooks() -> list[HookFunction]:
    """On both layers, with an edit, so that the activation is gathered on every rank."""
    return [HookFunction(f"{layer}.up", editing_function=keep) for layer in (0, 1)]


def on(job: Job, act: Any, *, step: int = 1, ahead: float = AHEAD) -> Any:
    """An edit that is kept, until the faulty rank does something else in a forward."""
    calls = 0

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Any:
        nonlocal calls
        calls += 1
        if not job.faulty or calls != step + 1:
            return x * 1.0
        time.sleep(ahead)
        job.fault()
        return act(x)

    return edit


def inside(job: Job, flex: FlexModel, name: str, act: Any) -> None:
    """Let the faulty rank do something else when a module is next called: user code of its own."""
    if not job.faulty:
        return

    def hook(module: nn.Module, args: Any) -> None:
        time.sleep(AHEAD)
        job.fault()
        act()

    flex.module.get_submodule(name).register_forward_pre_hook(hook)


def throw(_: Any = None) -> None:
    raise ValueError("the reason")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# -- an editing function, the model or the program fails on one rank -------------------------------


def edit_raises(job: Job) -> None:
    train(job.flex(hooks()[0], HookFunction("1.up", editing_function=on(job, throw))), 3)


def edit_returns_none(job: Job) -> None:
    train(job.flex(hooks()[0], HookFunction("1.up", editing_function=on(job, lambda x: None))), 3)


def edit_returns_wrong_shape(job: Job) -> None:
    edit = on(job, lambda x: x[..., :-1])
    train(job.flex(HookFunction("0.up", editing_function=edit), hooks()[1]), 3)


def backward_hook_raises(job: Job) -> None:
    flex = job.flex(*hooks())
    flex.register_full_backward_hook(HookFunction("1", editing_function=on(job, throw)))
    flex.register_full_backward_hook(HookFunction("0", editing_function=keep))
    train(flex, 3)


def model_raises(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.norm", throw)
    train(flex, 2)


def model_raises_in_generate(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.norm", throw)
    flex.generate(batch())
    flex.generate(batch())


def data_loading_raises(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        throw()
    train(flex)


def unknown_group(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex(batch(), groups="no such group")
    flex(batch())


def registers_unknown_module(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
    flex.register_forward_hook(HookFunction("1.norn" if job.faulty else "1.norm"))
    train(flex)


def fails_before_another_flex_model(job: Job) -> None:
    """The others wait for this rank where a FlexModel is built."""
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        throw()
    FlexModel(Layers(), {}, data_parallel_size=job.world)


def trainable_on_one_rank(job: Job) -> None:
    flex = job.flex(*hooks(), patience=PATIENCE)
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
    else:
        flex.register_trainable_module("probe", nn.Linear(INNER, INNER))
    train(flex)


# -- a rank ends, or stands still ------------------------------------------------------------------


def killed_in_our_gather(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.norm", kill)
    train(flex)


def killed_in_framework(job: Job) -> None:
    """The others stand in the layer's own all-reduce; over dp in that of the gradients."""
    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.act", kill)
    train(flex)


def killed_between_forwards(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        kill()
    train(flex)


def killed_with_the_store(job: Job) -> None:
    """No launcher: rank 0 hosts the store, as without torchrun, and it is rank 0 that dies."""
    dist.destroy_process_group()
    job.faulty = job.rank == 0
    port = job.folder / "port"
    if job.faulty:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".part").write_text(str(server.port))
        port.with_suffix(".part").rename(port)
    while not port.exists():
        time.sleep(0.01)
    job.port = int(port.read_text())
    job.start()
    killed_in_our_gather(job)


def stands_still(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.norm", stop)
    train(flex)


def killed_before_a_transfer(job: Job) -> None:
    flex = job.flex(*hooks())  # kept: without it its watch ends
    control = flex._session.mesh.control
    assert control is not None
    first, last = control.ranks[0], control.ranks[-1]
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        kill()
    if job.rank == first:
        control.receive(torch.zeros(4), last, 0)
    else:
        control.exchange([0])


def exits_early(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        dist.destroy_process_group()
        sys.exit(0)
    train(flex)


def exits_without_leaving(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        sys.exit(0)
    train(flex)


def restores_and_goes_on(job: Job) -> None:
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex.restore()
    train(flex.module if job.faulty else flex, 2)


# -- ranks that do not run the same ----------------------------------------------------------------


def no_hook(job: Job) -> None:
    flex = job.flex(*([] if job.faulty else hooks()))
    _train_from_here(job, flex)


def fewer_hooks(job: Job) -> None:
    _train_from_here(job, job.flex(*hooks()[: 1 if job.faulty else 2]))


def other_order(job: Job) -> None:
    _train_from_here(job, job.flex(*hooks()[:: -1 if job.faulty else 1]))


def other_groups(job: Job) -> None:
    flex = job.flex(*hooks())
    for hook in flex.get_group_hook_functions("all"):
        flex.update_hook_groups(hook, hook.module_name)
    with flex.hook_groups("0.up" if job.faulty else "1.up"):
        _train_from_here(job, flex)


def hooks_from_the_second_forward_on(job: Job) -> None:
    flex = job.flex(*([] if job.faulty else hooks()))
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        train(flex)
        for hook in hooks():
            flex.register_forward_hook(hook)
    train(flex, 2)


def _train_from_here(job: Job, flex: FlexModel) -> None:
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
    train(flex)


def skips_a_module(job: Job) -> None:
    """The others wait in our gather; this rank goes on to where none of ours is."""
    flex = job.flex(*hooks(), patience=PATIENCE)
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex.module.order = [0]
    train(flex)


def skips_one_of_two_alike(job: Job) -> None:
    """Its gather of layer 1 meets the others' of layer 0: it is the next forward that tells."""
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex.module.order = [1]
    flex(batch())
    flex(batch())


def changes_the_order(job: Job) -> None:
    """Every gather meets one, of the other layer."""
    flex = job.flex(*hooks())
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex.module.order = [1, 0]
    flex(batch())
    flex(batch())


def one_more_forward(job: Job) -> None:
    """One rank's forward meets nobody: the others are done."""
    flex = job.flex(*hooks(), patience=PATIENCE)
    train(flex)
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        flex(batch())
    dist.all_reduce(torch.ones(1))


def one_waits_in_backward(job: Job) -> None:
    """A circle: one rank goes on to the next forward, the others wait for it in a backward."""
    flex = job.flex(*hooks())
    flex.register_full_backward_hook(HookFunction("1", editing_function=keep))
    train(flex)
    out = flex(batch())
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
    else:
        out.sum().backward()
    flex(batch())


def loss_on_one_rank(job: Job) -> None:
    def save(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        save_ctx.seen = x
        return x

    flex = job.flex(HookFunction("0.up", editing_function=save))
    train(flex)
    loss = flex(batch()).sum()
    if job.faulty:
        time.sleep(AHEAD)
        job.fault()
        loss = loss + flex.save_ctx.seen.square().sum()
    loss.backward()
    flex(batch())


def fails_under_another_flex_model(job: Job) -> None:
    """Two FlexModels: one rank fails in the first, the others wait for it in the second."""
    first = job.flex(HookFunction("", editing_function=on(job, throw)))
    second = job.flex(*hooks())
    for _ in range(3):
        first(batch())
        second(batch())


# -- no fault: nobody must be stopped --------------------------------------------------------------


def all_fail_alike(job: Job) -> None:
    """Each forward every rank raises the same; then they run as if nothing had been."""
    calls = [0]

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor | None:
        calls[0] += 1
        return None if calls[0] in (2, 3, 5) else x * 1.0

    flex = job.flex(hooks()[0], HookFunction("1.up", editing_function=edit))
    for call in range(1, 7):
        if call in (2, 3, 5):
            time.sleep(0.3 * job.rank)
            try:
                flex(batch())
            except EditError:
                continue
            raise AssertionError("no EditError")
        train(flex)


def slow_edit(job: Job) -> None:
    def sleep(x: Tensor) -> Tensor:
        time.sleep(20.0)
        return x * 1.0

    train(job.flex(HookFunction("1.up", editing_function=on(job, sleep))), 3)


def edit_holds_the_interpreter(job: Job) -> None:
    """As some C extensions do: no other thread runs, so there is no sign of life."""

    def hold(x: Tensor) -> Tensor:
        ctypes.PyDLL(None).usleep(12_000_000)
        return x * 1.0

    train(job.flex(HookFunction("1.up", editing_function=on(job, hold))), 3)


def stopped_for_a_while(job: Job) -> None:
    def pause() -> None:
        subprocess.Popen(["/bin/sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        stop()

    flex = job.flex(*hooks())
    train(flex)
    inside(job, flex, "1.norm", pause)
    train(flex)


def all_stopped_for_a_while(job: Job) -> None:
    """A suspended job: a rank that waits finds the others' signs of life as old as its own."""
    flex = job.flex(*hooks())
    train(flex)
    ids: list[Any] = [None] * job.world
    dist.all_gather_object(ids, os.getpid())

    def pause() -> None:
        time.sleep(1.0)
        everyone = " ".join(map(str, ids))
        script = f"kill -STOP {everyone}; sleep 8; kill -CONT {everyone}"
        subprocess.Popen(["/bin/sh", "-c", script])
        time.sleep(2.0)

    inside(job, flex, "1.norm", pause)
    train(flex)


def slow_copy(job: Job) -> None:
    """Hooks are off while a FlexModel is copied: the others may be there long before."""

    def slowly(self: Layers, memo: dict) -> Layers:
        if job.faulty:
            time.sleep(4.0)
        del Layers.__deepcopy__
        return copy.deepcopy(self, memo)

    flex = job.flex(*hooks())
    train(flex)
    Layers.__deepcopy__ = slowly  # type: ignore[attr-defined]
    other = copy.deepcopy(flex)
    train(flex)
    train(other)
    other.restore()  # they share their posts, and the first goes on
    time.sleep(3.0 if job.faulty else 0.0)
    train(flex)


def late_transfer(job: Job) -> None:
    """A receiver waits for a tensor that its sender is late with."""
    flex = job.flex(*hooks())  # kept: without it its watch ends
    control = flex._session.mesh.control
    assert control is not None
    first, last = control.ranks[0], control.ranks[-1]
    if job.faulty:
        time.sleep(3.0)
        control.finish(control.send(torch.arange(4.0), first, 0))
    elif job.rank == first:
        received = torch.zeros(4)
        control.receive(received, last, 0)
        assert received.tolist() == [0.0, 1.0, 2.0, 3.0]


def fails_and_starts_again(job: Job) -> None:
    """A job that starts anew in the same processes, on the same store, finds no old fault."""
    flex = job.flex(hooks()[0], HookFunction("1.up", editing_function=on(job, throw)))
    try:
        train(flex, 3)
    except (RankFailedError, ValueError):
        pass
    else:
        raise AssertionError("no error")
    assert not dist.is_initialized()
    job.start("again")
    train(job.flex(*hooks()), 2)


def two_models_on_halves(job: Job) -> None:
    """Ranks 0, 1 and 2, 3 hold a model each; the second's fault does not concern the first."""
    half = [0, 1] if job.rank < 2 else [2, 3]
    group = dist.new_group(half, use_local_synchronization=True)
    flex = FlexModel(Layers(), {}, data_parallel_size=2, process_group=group)
    flex.register_forward_hook(hooks()[0])
    flex.register_forward_hook(HookFunction("1.up", editing_function=on(job, throw)))
    for _ in range(3):
        flex(batch()).sum().backward()
    time.sleep(3.0)
    flex(batch())


def many_flex_models(job: Job) -> None:
    """A hundred, one after the other: what each holds is given back."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        tasks = len(list(Path("/proc/self/task").iterdir()))
        return threading.active_count(), tasks, len(list(Path("/proc/self/fd").iterdir()))

    model, sizes = Layers(), {"data_parallel_size": job.world}
    for count in range(100):
        with FlexModel(model, {}, **sizes) as flex:
            flex.register_forward_hook(hooks()[0])
            if count % 10 == 0:
                train(flex)
        del flex
        if count == 1:
            before = held()
    dist.barrier()
    after = held()
    assert all(a <= b + 3 for a, b in zip(after, before, strict=True)), (before, after)


# -- the nursery -----------------------------------------------------------------------------------


def nurse() -> dict[str, Any]:
    """Fork ranks and report their ends until the input closes; a fork returns what it is to run."""
    children: set[int] = set()
    waiting = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                child = os.fork()
                if child == 0:
                    return told
                children.add(child)
                _say({"started": child, "for": told["id"]})
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            children.discard(child)
            code = os.waitstatus_to_exitcode(status)
            _say({"ended": child, "code": code, "time": time.time()})
    for child in children:
        os.kill(child, signal.SIGKILL)
    sys.exit(0)


def _say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def settle(told: dict[str, Any]) -> None:
    """Make the fork a process of its own, that ends with the nursery."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(Path(told["folder"]) / f"{told['rank']}.log", os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(
        RANK=str(told["rank"]),
        LOCAL_RANK=str(told["rank"]),
        WORLD_SIZE=str(told["world"]),
        GLOO_SOCKET_IFNAME="lo",
    )
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    if told["layout"] == "2x2":
        _QUICK.append(True)


def run(told: dict[str, Any]) -> None:
    job = Job(told)
    try:
        globals()[told["fault"]](job)
    except Exception as error:
        job.tell(error)
        raise
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # a fork need not go through what the nursery imported
    told = nurse()
    settle(told)
    run(told)
