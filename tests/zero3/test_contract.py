"""What isolation takes for granted about DeepSpeed. A new release fails here first and says what moved."""

from __future__ import annotations

import ast
import inspect
import textwrap

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from packaging.version import Version

from epi_ds.zero3.guard import SUPPORTED_DEEPSPEED
from epi_ds.zero3.mixin import IsolationMixin
from epi_ds.zero3.persistence.engine import IsolationEngineMixin

OPTIMIZER_OVERRIDES = {
    "partition_grads": ["self", "params_to_release", "grad_partitions"],
    "_offload_grad_partition_at_boundary": [
        "self",
        "param",
        "grad_buffer",
        "offload_fp32_gradients",
        "offload_fp32_offsets",
    ],
    "_constant_buffered_norm2": ["self", "input", "buffer_size"],
    "zero_grad": ["self", "set_to_none"],
    "step": ["self", "closure"],
    "_get_norm_groups": ["self"],
    "unscale_and_clip_grads": ["self", "sub_group_id", "total_norm"],
    "_optimizer_step": ["self", "sub_group_id"],
}
ENGINE_OVERRIDES = {
    "save_checkpoint": [
        "self",
        "save_dir",
        "tag",
        "client_state",
        "save_latest",
        "exclude_frozen_parameters",
    ],
    "load_checkpoint": [
        "self",
        "load_dir",
        "tag",
        "load_module_strict",
        "load_optimizer_states",
        "load_lr_scheduler_states",
        "load_module_only",
        "custom_load_fn",
    ],
    "destroy": ["self"],
    "zero_nvme_offload_optimizer": ["self"],
    "_copy_recovery_script": ["self", "save_path"],
    "_get_all_ckpt_names": ["self", "checkpoints_path", "tag"],
    "load_module_state_dict": [
        "self",
        "checkpoint",
        "strict",
        "custom_load_fn",
        "fetch_z3_params",
        "z3_params_to_fetch",
        "allowed_missing_keys",
    ],
    "_load_zero_checkpoint": ["self", "load_dir", "tag", "load_optimizer_states"],
}
CALLED = {
    "_pre_step": ["self"],
    "_partition_all_parameters": ["self"],
    "_prepare_sub_group": ["self", "sub_group_id", "timer_names"],
    "_release_sub_group": ["self", "sub_group_id", "timer_names"],
    "_post_step": ["self", "timer_names"],
    "get_param_id": ["self", "param"],
    "is_gradient_accumulation_boundary": ["self"],
    "_update_scale": ["self", "has_overflow"],
    "_swappable_optimizer_subgroup": ["self", "sub_group_id"],
    "_optimizer_states_and_gradient_swap_in": ["self", "sub_group_id", "timer_names"],
    "_writeback_swap_state": ["self", "sub_group_id", "write_opt_state", "write_gradients"],
    "reset_swap_buffers": ["self"],
    "checkpoint_event_prologue": ["self"],
    "checkpoint_event_epilogue": ["self"],
    "_set_fp32_optimizer_param_groups": ["self"],
    "_clear_fp32_optimizer_param_groups": ["self"],
}


def _definition(cls: type, method: str) -> ast.FunctionDef:
    """Read a method from its class's source: DeepSpeed's profiling decorator hides signatures."""
    for base in cls.__mro__:
        if method in vars(base):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == method)
    raise AssertionError(f"{cls.__name__} has no {method}")


def _parameters(cls: type, method: str) -> list[str]:
    return [argument.arg for argument in _definition(cls, method).args.args]


@pytest.mark.parametrize("method", OPTIMIZER_OVERRIDES)
def test_overridden_optimizer_methods_have_the_known_signature(method: str) -> None:
    assert _parameters(DeepSpeedZeroOptimizer_Stage3, method) == OPTIMIZER_OVERRIDES[method]
    assert _parameters(IsolationMixin, method) == OPTIMIZER_OVERRIDES[method]


@pytest.mark.parametrize("method", ENGINE_OVERRIDES)
def test_overridden_engine_methods_have_the_known_signature(method: str) -> None:
    assert _parameters(DeepSpeedEngine, method) == ENGINE_OVERRIDES[method]
    assert _parameters(IsolationEngineMixin, method) == ENGINE_OVERRIDES[method]


@pytest.mark.parametrize("method", CALLED)
def test_called_optimizer_methods_have_the_known_signature(method: str) -> None:
    assert _parameters(DeepSpeedZeroOptimizer_Stage3, method) == CALLED[method]


def test_nothing_is_overridden_that_this_test_does_not_pin() -> None:
    for mixin, base, pinned in (
        (IsolationMixin, DeepSpeedZeroOptimizer_Stage3, OPTIMIZER_OVERRIDES),
        (IsolationEngineMixin, DeepSpeedEngine, ENGINE_OVERRIDES),
    ):
        own = {name: value for part in mixin.__mro__[:-1] for name, value in vars(part).items()}
        methods = {name for name, value in own.items() if inspect.isfunction(value)}
        assert {name for name in methods if hasattr(base, name)} == set(pinned)


def test_no_name_of_ours_hides_one_of_the_user_s_model() -> None:
    for mixin, base in ((IsolationMixin, DeepSpeedZeroOptimizer_Stage3), (IsolationEngineMixin, DeepSpeedEngine)):
        own = {name for part in mixin.__mro__[:-1] for name in vars(part) if not name.startswith("__")}
        assert {name for name in own if not hasattr(base, name) and not name.startswith("_epi_")} == set()


def test_a_step_runs_in_the_order_that_isolation_relies_on() -> None:
    source = ast.unparse(_definition(DeepSpeedZeroOptimizer_Stage3, "step"))
    order = [
        "self._pre_step()",
        "self._overflow_check_and_loss_scale_update(update_scale=False)",
        "self._get_norm_groups()",
        "if self._loss_scale_update_and_overflow_cleanup():",
        "self._global_grad_norm = scaled_global_grad_norm / self.loss_scale",
        "self._prepare_sub_group(sub_group_id, timer_names)",
        "self.unscale_and_clip_grads(sub_group_id, scaled_global_grad_norm)",
        "self._optimizer_step(sub_group_id)",
        "self._reassign_or_swap_out_partitioned_parameters(sub_group_id)",
        "self._release_sub_group(sub_group_id, timer_names)",
        "self._post_step(timer_names)",
    ]
    positions = [source.index(line) for line in order]
    assert positions == sorted(positions)


def test_what_isolation_does_in_place_of_unscaling_is_what_zero3_does() -> None:
    """The override multiplies by the same number in the pass that observes, and calls nothing."""
    body = [ast.unparse(line) for line in _definition(DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads").body]
    assert body == [
        "combined_scale = self.loss_scale",
        "if self.clip_grad > 0.0:\n"
        "    clip = (total_norm / self.loss_scale + 1e-06) / self.clip_grad\n"
        "    clip = torch.clamp(clip, min=1.0)\n"
        "    combined_scale = clip * self.loss_scale",
        "self.fp32_partitioned_groups_flat[sub_group_id].grad.mul_(1.0 / combined_scale)",
    ]


def test_the_norm_at_the_boundary_is_taken_where_it_is_replaced() -> None:
    source = ast.unparse(_definition(DeepSpeedZeroOptimizer_Stage3, "_offload_grad_partition_at_boundary"))
    taken = "self.norm_for_param_grads[self.get_param_id(param)] = self._constant_buffered_norm2(grad_buffer)"
    assert taken in source
    assert source.count("norm2(") == 1


def test_a_save_writes_what_a_tag_writer_guards() -> None:
    """Files go through the checkpoint engine; what does not is overridden, or is our own copy of it."""
    source = ast.unparse(_definition(DeepSpeedEngine, "save_checkpoint"))
    assert source.count("self.zero_nvme_offload_optimizer()") == source.count("copytree(") == 1
    assert "offload_ckpt_dir = os.path.join(save_dir, tag, 'offloaded_tensors', rank_dir)" in source
    for method, argument in (("_save_checkpoint", "path=save_path"), ("_save_zero_checkpoint", "zero_checkpoint_name")):
        written = ast.unparse(_definition(DeepSpeedEngine, method))
        assert written.count("self.checkpoint_engine.save(") == 1
        assert argument in written
        assert "torch.save" not in written
    assert "self._copy_recovery_script(save_path)" in ast.unparse(_definition(DeepSpeedEngine, "_save_zero_checkpoint"))


def test_a_load_comes_by_what_is_overridden() -> None:
    source = ast.unparse(_definition(DeepSpeedEngine, "load_checkpoint"))
    assert "self._load_zero_checkpoint(load_dir, tag," in source
    assert "ckpt_list = self._get_all_ckpt_names(load_dir, tag)" in ast.unparse(
        _definition(DeepSpeedEngine, "_load_checkpoint")
    )
    # What a load of another layout leaves to ZeRO-3: weights from fp32, and scaling, without the optimizer's state.
    rigid = ast.unparse(_definition(DeepSpeedZeroOptimizer_Stage3, "_rigid_load_state_dict"))
    for taken in ("LOSS_SCALER", "'dynamic_loss_scale'", "'overflow'", "FP32_FLAT_GROUPS"):
        assert f"state_dict[{taken}]" in rigid


def test_states_are_numbered_like_sub_groups() -> None:
    """Sub-groups are made parameter group by parameter group, and a state dict numbers parameters in that order."""
    source = ast.unparse(_definition(DeepSpeedZeroOptimizer_Stage3, "_set_fp32_optimizer_param_groups"))
    assert "for sub_group_id, _ in enumerate(self.fp16_groups):" in source
    assert ".append(self.fp32_partitioned_groups_flat[sub_group_id])" in source


def test_the_installed_release_is_supported() -> None:
    assert Version(deepspeed.__version__) in SUPPORTED_DEEPSPEED
