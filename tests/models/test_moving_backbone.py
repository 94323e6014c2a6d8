"""The backbone that moves while HVQ-Trans trains: what its released EfficientNet does in training mode."""

import pytest
import timm
import torch

from models.moving_backbone import DropBranch, moving_statistics, set_moving


def test_stochastic_depth_grows_with_the_block_of_the_whole_network():
    with torch.device("meta"):
        net = timm.create_model("tf_efficientnet_b4", features_only=True, out_indices=(0, 1, 2, 3))
        del net.blocks[5:]  # what lies above the highest level
    set_moving(net, "tf_efficientnet_b4.aa_in1k")
    blocks = [block for stage in net.blocks for block in stage]
    rates = {k: block.drop_path.rate for k, block in enumerate(blocks) if isinstance(block.drop_path, DropBranch)}
    assert rates[1] == pytest.approx(0.2 * 1 / 32)
    assert rates[21] == pytest.approx(0.2 * 21 / 32)
    assert set(rates) == {k for k, block in enumerate(blocks) if block.has_skip}
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.01}
    assert all(norm.eps == pytest.approx(1e-3) for norm in norms)


def test_a_branch_is_dropped_per_image_and_the_others_are_scaled_up():
    torch.manual_seed(0)
    drop = DropBranch(0.25).train()
    out = drop(torch.ones(2000, 3, 1, 1))
    kept = out[:, 0, 0, 0]
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(out[:, 0], out[:, 2])
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(drop.eval()(out), out)


def test_statistics_follow_in_training_mode_only_and_networks_of_other_kinds_have_no_branches():
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1,))
    set_moving(net, "test_resnet")
    assert not any(isinstance(module, DropBranch) for module in net.modules())
    before = moving_statistics(net)
    with torch.no_grad():
        net.eval()(torch.randn(2, 3, 32, 32) + 3)
        assert all(torch.equal(value, before[name]) for name, value in moving_statistics(net).items())
        net.train()(torch.randn(2, 3, 32, 32) + 3)
    assert any(not torch.equal(value, before[name]) for name, value in moving_statistics(net).items())
