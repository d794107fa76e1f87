"""The wrapper: registers hooks on any model, sharded or not, and takes them all off again."""

from __future__ import annotations

import copy
import weakref
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh

from flex_model.core.arguments import check_options, check_wrapped, whole_sizes
from flex_model.core.groups import ALL, HookGroups, Members
from flex_model.core.hook_function import EditingFunction, HookFunction
from flex_model.core.hook_point import Kind
from flex_model.core.job_mesh import job_mesh
from flex_model.core.parameters import whole_parameter
from flex_model.core.records import Keep, Records
from flex_model.core.registry import HookRegistry, unknown_name
from flex_model.core.session import Session
from flex_model.distributed.broadcast import broadcast_module
from flex_model.distributed.mesh import ParallelMesh, watched
from flex_model.errors import (
    ConfigurationError,
    CopyError,
    GroupError,
    LayoutError,
    RegistrationError,
)
from flex_model.layouts.experts import refused
from flex_model.layouts.names import named_modules, named_parameters, plain_name
from flex_model.layouts.resolve import ContextOrder, Loss

__all__ = ["FlexModel", "Observer"]


class Observer(Protocol):
    """What looks at activations through several hook functions."""

    def hook_functions(self, module_name: str) -> list[tuple[Kind, HookFunction]]:
        """The hook functions by which it looks at a module, and their kinds."""


class FlexModel(nn.Module):
    """Wraps a model so that hook functions see and edit its activations whole.

    The wrapped model may be sharded by fairscale, megatron-core, torch's ``parallelize_module``,
    transformers' ``tp_plan`` or DDP, or not at all. Every rank wraps its part and registers the
    same hooks; each hook function then works on the one whole tensor, with the values, gradients
    and random draws that one process would have. "One process" means: fed all data-parallel ranks'
    microbatches, with the mean (or sum) of their losses.

    Args:
        module: the model on this rank.
        output_ptr: dict that records go to: ``output_ptr[module_name]`` is a list of whole,
            detached CPU tensors, one per call, each the value before any edit. It is only appended
            to; clear it yourself. A further kind of hook on one module records under
            ``"module_name:kind"`` (see `record_key`).
        tensor_parallel_size: ranks a layer is spread over. Sizes may be left at 1 where they can
            be read off the model or its framework.
        pipeline_parallel_size: pipeline stages.
        data_parallel_size: replicas that get different batches.
        process_group: the ranks that hold the model; None for all.
        context_parallel_size: keyword only. Ranks that hold parts of each sequence. Hooks see whole
            sequences in the order of positions; but what the model itself gathers over these ranks
            they see in the order that it has there.
        context_order: keyword only. "zigzag" if rank r of C holds chunks r and 2C-1-r of the
            sequence's 2C, as Megatron cuts it; "contiguous" if it holds piece r of C.
        mesh: keyword only. A ``DeviceMesh`` with dims named out of "pp", "dp", "cp", "tp", in place
            of the sizes.
        keep: keyword only. Where records are kept: "first" (the model's first rank; the other
            ranks' dicts stay empty), "all", or one global rank.
        data_parallel_loss: keyword only. "mean" if the losses of data-parallel (and of
            context-parallel) ranks are averaged, "sum" if added.
        seed: keyword only. Of random edits; the same on every rank.
        batch_dim: keyword only. Dim of the model's input tensors that data parallelism cuts.
        sequence_dim: keyword only. The same for context parallelism.
        debug: keyword only. Check every edit: for NaNs, for replicas that differ, and for functions
            that declared to need less of the tensor than they do. Slow.
        patience: keyword only. Seconds that a rank may stand in a collective that is none of ours
            while others wait for it in one that is, before it counts as stuck.
        store: keyword only. Where ranks tell each other why they stop; None for the job's own.

    Raises:
        ConfigurationError: sizes, mesh or options do not fit the job.

    Examples:
        >>> activations = {}
        >>> model = FlexModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), activations)
        >>> model.register_forward_hook(HookFunction("0"))
        >>> _ = model(torch.ones(2, 4))
        >>> activations["0"][0].shape
        torch.Size([2, 8])
        >>> plain = model.restore()
    """

    def __init__(
        self,
        module: nn.Module,
        output_ptr: dict[str, list[Tensor]],
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        process_group: ProcessGroup | None = None,
        *,
        context_parallel_size: int = 1,
        context_order: ContextOrder = "zigzag",
        mesh: DeviceMesh | None = None,
        keep: Keep = "first",
        data_parallel_loss: Loss = "mean",
        seed: int = 0,
        batch_dim: int = 0,
        sequence_dim: int = 1,
        debug: bool = False,
        patience: float = 60.0,
        store: Store | None = None,
    ) -> None:
        super().__init__()
        check_wrapped(module, output_ptr)
        check_options(
            data_parallel_loss=data_parallel_loss, context_order=context_order, seed=seed,
            batch_dim=batch_dim, sequence_dim=sequence_dim, patience=patience, mesh=mesh,
            process_group=process_group, store=store,
        )  # fmt: skip
        sizes = {
            "pp": pipeline_parallel_size,
            "dp": data_parallel_size,
            "cp": context_parallel_size,
            "tp": tensor_parallel_size,
        }
        ranks = watched(job_mesh(module, sizes, process_group, mesh), store, patience)
        if ranks.size("cp") > 1 and batch_dim == sequence_dim:
            raise ConfigurationError(
                f"batch_dim and sequence_dim are both {batch_dim}, but context parallelism cuts "
                "the model's inputs along another dim than data parallelism. Give both."
            )
        self._install(
            module, ranks, output_ptr, keep,
            seed=seed, loss=data_parallel_loss, batch_dim=batch_dim, sequence_dim=sequence_dim,
            zigzag=context_order == "zigzag", debug=debug,
        )  # fmt: skip

    def _install(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        output_ptr: dict[str, list[Tensor]],
        keep: Keep,
        **options: Any,
    ) -> None:
        self.module = module
        self.output_ptr = output_ptr
        self._session = Session(module, mesh, Records(output_ptr, keep, mesh), **options)
        self._keep = keep
        self._options = options
        self.trainable_modules = self._session.modules
        self._groups = HookGroups()
        self._session.is_off = self._groups.is_off
        self._registry = HookRegistry(module, self._session)
        self._session.attach()
        # A FlexModel that is dropped without restore() must not leave its hooks behind.
        weakref.finalize(self, self._registry.clear)

    # -- registering -----------------------------------------------------------------------

    def register_forward_hook(self, hook_function: HookFunction) -> None:  # type: ignore[override]
        """Visit a module's output.

        Args:
            hook_function: what to retrieve and how to edit it.

        Raises:
            UnknownModuleError: no such module; the message names the nearest.
            RegistrationError: the hook function is registered already.
        """
        self._register(hook_function, "forward")

    def register_forward_pre_hook(self, hook_function: HookFunction) -> None:  # type: ignore[override]
        """Visit a module's input, positional or by keyword. See `register_forward_hook`."""
        self._register(hook_function, "forward_pre")

    def register_full_backward_hook(self, hook_function: HookFunction) -> None:  # type: ignore[override]
        """Visit the gradient of a module's positional input.

        The whole gradient is that of the one-process loss. Calls in which no gradient reaches the
        input are passed over. See `register_forward_hook`.
        """
        self._register(hook_function, "full_backward")

    def register_full_backward_pre_hook(self, hook_function: HookFunction) -> None:  # type: ignore[override]
        """Visit the gradient of a module's output. See `register_full_backward_hook`."""
        self._register(hook_function, "full_backward_pre")

    def register_hook(self, hook_function: HookFunction) -> None:
        """Visit the gradient of a parameter, named in place of a module.

        The whole gradient is the parameter's in the one-process loss, before accumulation.
        """
        self._register(hook_function, "tensor")

    def register_importance_hook(self, module_name: str, hook: Observer) -> None:
        """Let a hook of `flex_model.importance` see a module's input or output as it is sharded.

        Nothing of the activation is moved or changed. The hook functions that it takes belong to
        groups and are taken off as any others.

        Raises:
            UnknownModuleError: see `register_forward_hook`.
        """
        hooks = hook.hook_functions(module_name)
        for kind, function in hooks:
            self._registry.check(function, kind)
        for kind, function in hooks:
            self._register(function, kind)

    def has_hook(self, hook_function: HookFunction) -> bool:
        """Whether a hook function is registered with this FlexModel."""
        return hook_function in self._registry.kinds

    def remove_hook(self, hook_function: HookFunction) -> None:
        """Take one hook function off again; the others stay. Every rank does so alike.

        Raises:
            GroupError: it is not registered with this FlexModel.
        """
        self._groups.groups_of(hook_function)
        self._registry.remove(hook_function)
        self._groups.remove(hook_function)

    def register_trainable_module(self, name: str, module: nn.Module) -> None:
        """Hand a module to every editing function, as ``modules[name]``.

        Collective: parameters and buffers are broadcast from the model's first rank. Since edits
        run on the whole tensor on every rank, the module's gradients come out whole and equal on
        every rank, with no reduction of the caller's.

        Raises:
            RegistrationError: the name is taken, or no module is given.
        """
        if not isinstance(module, nn.Module):
            raise RegistrationError(
                f"Trainable module {name!r} must be an nn.Module, got {type(module).__name__}."
            )
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise RegistrationError(
                f"{name!r} cannot name a trainable module: it must be a non-empty string without "
                "dots that is no attribute of nn.ModuleDict."
            )
        if name in self.trainable_modules:
            raise RegistrationError(f"A trainable module named {name!r} is registered already.")
        broadcast_module(module, self._session.mesh)
        self.trainable_modules[name] = module

    def _register(self, hook: HookFunction, kind: Kind) -> None:
        self._registry.register(hook, kind)
        self._groups.add(hook)

    def record_key(self, hook_function: HookFunction) -> str:
        """Where a registered hook function's records are found in ``output_ptr``.

        The first kind of hook on a module records under the module's name, as in flex-model 0.1.0;
        a further kind (or another ``unpack_idx``) under ``"name:kind"`` (``"name:kind[idx]"``), so
        that forward and backward records never share a list. Hook functions of one kind on one
        tensor share one record per call, made before the first edit.
        """
        self._groups.groups_of(hook_function)
        return self._registry.record_key(hook_function)

    # -- groups ----------------------------------------------------------------------------

    def create_hook_group(
        self,
        group_name: str,
        group_constructor: str,
        expected_shape: Sequence[int | None] | None = None,
        editing_function: EditingFunction | None = None,
        unpack_idx: int = 0,
        hook_type: Kind = "forward",
    ) -> None:
        """Make one hook function per module whose name contains a string, as a group.

        Args:
            group_name: the group; it may exist.
            group_constructor: part of the module names (of the parameter names for "tensor").
            expected_shape: for each hook function.
            editing_function: for each hook function.
            unpack_idx: for each hook function.
            hook_type: "forward", "forward_pre", "full_backward", "full_backward_pre" or "tensor".

        Raises:
            UnknownModuleError: nothing matches.
            RegistrationError: no such hook type.
        """
        names = self._session.stages.names(parameters=hook_type == "tensor")
        matching = [name for name in names if group_constructor in name]
        if not matching:
            raise unknown_name("module", group_constructor, names)
        hooks = [
            HookFunction(name, expected_shape, editing_function, unpack_idx) for name in matching
        ]
        for hook in hooks:
            self._registry.check(hook, hook_type)
        for hook in hooks:
            self._register(hook, hook_type)
        self._groups.extend(hooks, group_name)

    def update_hook_groups(self, group_constructor: Members, group_name: str) -> None:
        """Put hook functions into a group.

        Args:
            group_constructor: hook functions, one, or a part of their module names.
            group_name: the group; made if it does not exist.
        """
        self._groups.extend(group_constructor, group_name)

    def remove_hook_groups(self, group_constructor: Members, group_name: str) -> None:
        """Take hook functions out of a group (not out of "all").

        Raises:
            GroupError: the group does not exist, or is "all".
        """
        self._groups.reduce(group_constructor, group_name)

    def get_hook_function_groups(self, hook_function: HookFunction) -> set[str]:
        """The groups a hook function belongs to."""
        return self._groups.groups_of(hook_function)

    def get_group_hook_functions(self, group_name: str) -> list[HookFunction]:
        """The hook functions of a group, in order of registration."""
        return self._groups.members(group_name)

    def switch_hook_groups(self, groups: str | Iterable[str], on: bool) -> None:
        """Switch hook groups on or off until told otherwise, whatever a call chooses.

        A hook function runs if none of its groups is off. Every rank switches alike, between
        forwards.

        Raises:
            GroupError: a group that does not exist; none is switched.
        """
        self._groups.switch(groups, on)

    def hook_groups(
        self, groups: str | Iterable[str] = ALL, complement: bool = False
    ) -> AbstractContextManager[None]:
        """Switch on only these groups while inside, for calls that are not this ``forward``.

        Examples:
            >>> with model.hook_groups("steering"):
            ...     model.generate(**prompt)
        """
        try:
            chosen = self._groups.active(groups, complement)
        except GroupError as error:
            raise self._session.failed("the choice of hook groups", error) from None
        return self._session.only(chosen)

    # -- running ---------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one run of a pipeline's schedule, forward and backward. Collective.

        At its end the records of every stage are where records are kept, in the order of the
        microbatches; ``save_ctx`` holds what any stage stored, and the trainable modules' gradients
        are summed over the stages, on every rank. Where the model is no pipeline it does nothing.

        What an editing function stores, later stages read in the same microbatch, and backward
        hooks of its own or a later stage in that microbatch's backward; without autograd graphs.
        Lists and dicts may be added to by every stage. What would have to come from a later stage
        is refused, as is a gradient that would flow back through a stored value.

        torch's schedules divide gradients of parameters by the number of microbatches when they end
        (``scale_grads``), those of trainable modules too; backward hooks see them undivided. Give
        ``PipelineStage`` the FlexModel, but a ``DistributedDataParallel`` module itself. Where a
        rank has several stages each has its FlexModel, whose steps are entered one inside another.

        Examples:
            >>> with model.step():
            ...     schedule.step(inputs, target=labels)

        Raises:
            RankDisagreementError: the stages have other hooks registered.
        """
        with self._session.step(self._registry.kinds):
            yield

    def forward(
        self,
        *args: Any,
        groups: str | Iterable[str] = ALL,
        complement: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the wrapped model with hooks.

        Args:
            *args: passed to the wrapped model.
            groups: hook groups to run. If the wrapped model has a keyword of this name itself, it
                gets it; choose groups by `hook_groups` then.
            complement: run every hook but those.
            **kwargs: passed to the wrapped model.

        Raises:
            GroupError: a group that does not exist.
        """
        if torch.compiler.is_exporting():
            raise CopyError(
                "torch.export takes the model without Python, and so without hooks: export what "
                "restore() returns."
            )
        with self._session.turn():
            return self._called(groups, complement, args, kwargs)

    def _called(
        self, groups: str | Iterable[str], complement: bool, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(groups, str) and groups == ALL and not complement:
            return self._run(args, kwargs)
        taken = signature(self.module.forward).parameters
        if "groups" in taken or "complement" in taken:
            given: dict[str, Any] = {"complement": complement} if complement else {}
            given |= {"groups": groups} if groups is not ALL else {}
            kwargs.update({name: value for name, value in given.items() if name in taken})
            return self._run(args, kwargs)
        with self.hook_groups(groups, complement):
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.module(*args, **kwargs)
        except Exception as error:
            self._session.close()
            told = self._session.failed("the model's forward", error)
            if told is error:
                raise
            raise told from error
        except BaseException:  # an interrupt
            self._session.close()
            raise

    def __getattr__(self, name: str) -> Any:
        """What FlexModel has not itself (``generate``, ``config``...) is the wrapped model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    # -- looking inside --------------------------------------------------------------------

    @property
    def save_ctx(self) -> Namespace:
        """The namespace that editing functions store what they like in."""
        return self._session.save_ctx

    @property
    def parallel_mesh(self) -> ParallelMesh:
        """The job's ranks, as hooks use them."""
        return self._session.mesh

    @property
    def wrapped_module_names(self) -> list[str]:
        """Names of the wrapped model's submodules, the root's ("") first."""
        return [name for name, _ in named_modules(self.module)]

    @property
    def trainable_modules_names(self) -> list[str]:
        """Names of the trainable modules."""
        return list(self.trainable_modules.keys())

    @property
    def all_modules_names(self) -> list[str]:
        """Names of the wrapped model's submodules, then of the trainable modules."""
        return self.wrapped_module_names + self.trainable_modules_names

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapped model's parameters under their own names, then the trainable modules'.

        A trainable module's parameters are named ``trainable_modules.<name>.<parameter>``, so an
        optimizer over ``parameters()`` trains them too.
        """
        yield from self.module.named_parameters(prefix, recurse, remove_duplicate)
        inner = f"{prefix}.trainable_modules" if prefix else "trainable_modules"
        yield from self.trainable_modules.named_parameters(inner, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As `named_parameters`, for buffers."""
        yield from self.module.named_buffers(prefix, recurse, remove_duplicate)
        inner = f"{prefix}.trainable_modules" if prefix else "trainable_modules"
        yield from self.trainable_modules.named_buffers(inner, recurse, remove_duplicate)

    def get_module_parameter(
        self, parameter_name: str, expected_shape: Sequence[int | None] | None = None
    ) -> Tensor:
        """A whole parameter, in one-process order, as a detached CPU copy on every rank.

        Collective over the ranks that hold its shards, and over a pipeline's stages.

        Args:
            parameter_name: as ``named_parameters()`` of the wrapped model spells it.
            expected_shape: whole sizes, None where they are to be filled in; only needed where
                nothing tells how the parameter lies.

        Raises:
            UnknownModuleError: no such parameter.
            LayoutError: the name means another parameter on each rank.
            HintError: a hint that does not fit.
        """
        parameter_name, stages = plain_name(parameter_name, self.module), self._session.stages
        holding = stages.holding(parameter_name, parameter=True)
        if not holding:
            raise unknown_name("parameter", parameter_name, stages.names(parameters=True))
        pipeline = self._session.pipeline
        if pipeline is None:
            return self._whole_parameter(parameter_name, expected_shape)
        try:
            here = stages.own == holding[0]
            own = self._whole_parameter(parameter_name, expected_shape) if here else None
            whole: Tensor = pipeline.line.shared(own, holding[0], "a parameter")
            return whole
        except Exception as error:
            told = self._session.failed(f"parameter {parameter_name}", error)
            if told is error:
                raise
            raise told from error

    def _whole_parameter(self, name: str, expected_shape: Sequence[int | None] | None) -> Tensor:
        why = refused(self.module, name, self._session.sizes, parameter=True)
        if why is not None:
            rank = self._session.mesh.rank
            raise LayoutError(f"Parameter {name} (rank {rank}) cannot be read: {why}")
        return whole_parameter(
            self.module,
            name,
            dict(named_parameters(self.module))[name],
            self._session.mesh,
            whole_sizes(expected_shape, name) if expected_shape is not None else None,
        )

    def beside(self) -> FlexModel:
        """A second FlexModel around the same model and ranks, with hooks and records of its own.

        Both models' hooks run in every forward; ``restore()`` takes off one's own.
        """
        return self._another(self.module, {})

    # -- leaving ---------------------------------------------------------------------------

    def restore(self) -> nn.Module:
        """Take every hook off and return the wrapped model, as it was before.

        Trainable modules, records and the save context stay with the FlexModel, and hook functions
        may be registered again, here or elsewhere.
        """
        self._registry.clear()
        self._groups.clear()
        return self.module

    def __enter__(self) -> FlexModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CopyError(
            "A FlexModel cannot be pickled: its hooks belong to this job's ranks. Save the "
            "state_dict() of its module and of trainable_modules, or pickle what restore() "
            "returns. copy.deepcopy() gives a second FlexModel."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FlexModel:
        """A copy with a model, trainable modules and hooks of its own, on the same ranks."""
        hooks = self._registry.kinds
        groups = {hook: self._groups.groups_of(hook) for hook in hooks}
        off = self._groups.off
        with self._session.between_hooks():
            self.restore()
            try:
                module = copy.deepcopy(self.module, memo)
            finally:
                self._register_again(hooks, groups, off)
        other = self._another(module, copy.deepcopy(self.output_ptr, memo))
        for name, trainable in self.trainable_modules.items():
            other.trainable_modules[name] = copy.deepcopy(trainable, memo)
        copies = {hook: copy.copy(hook) for hook in hooks}
        other._register_again(
            {copies[hook]: kind for hook, kind in hooks.items()},
            {copies[hook]: names for hook, names in groups.items()},
            off,
        )
        return other

    def _another(self, module: nn.Module, output_ptr: dict[str, list[Tensor]]) -> FlexModel:
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        other._install(module, self._session.mesh, output_ptr, self._keep, **self._options)
        return other

    def _register_again(
        self,
        hooks: dict[HookFunction, Kind],
        groups: dict[HookFunction, set[str]],
        off: frozenset[str],
    ) -> None:
        self._session.attach()
        for hook, kind in hooks.items():
            self._register(hook, kind)
            for group in groups[hook] - {ALL}:
                self._groups.extend(hook, group)
        self._groups.switch(off & self._groups.names, on=False)
