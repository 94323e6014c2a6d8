"""Uninformed Students' networks: the dense form is the patchwise one, and the readings mean what they say."""

import numpy as np
import pytest
import torch

from models import us

WIDTHS = {17: (4, 6, 6, 5), 33: (4, 6, 6, 5), 65: (4, 4, 6, 6, 5)}


def network(**options) -> us.US:
    torch.manual_seed(0)
    return us.US(7, **{"patch_sizes": (17, 33), "widths": WIDTHS} | options)


def scaled(net: us.US) -> us.US:
    """With targets as they are, and maps on a scale."""
    for scale in net.scales.values():
        scale.set(torch.zeros_like(scale.mean), torch.ones_like(scale.std))
    net.statistics.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]).expand_as(net.statistics))
    return net


@pytest.mark.parametrize("size", [17, 33, 65])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@torch.no_grad()
def test_a_pixels_descriptor_is_that_of_the_patch_cut_out_around_it(size, padding):
    torch.manual_seed(0)
    net = us.PatchNetwork(size, WIDTHS[size], padding)
    images = torch.rand(2, 3, 37, 45)  # no multiple of 4 or 8, not square, more than one
    dense, half = net(images), size // 2
    assert dense.shape == (2, 5, 37, 45)
    mode = "constant" if padding == "zeros" else "reflect"
    padded = torch.nn.functional.pad(images, (half,) * 4, mode=mode)
    for row, column in ((0, 0), (36, 44), (17, 3), (20, 21), (5, 30)):
        patch = net.patches(padded[:, :, row : row + size, column : column + size])
        torch.testing.assert_close(dense[:, :, row, column], patch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "reach"), [(17, (8, 8)), (33, (16, 15)), (65, (32, 27))])
@torch.no_grad()
def test_a_pixel_outside_the_field_changes_nothing_and_one_inside_does(size, reach):
    torch.manual_seed(0)
    net = us.PatchNetwork(size, WIDTHS[size])
    image = torch.rand(1, 3, 70, 70)
    at = net(image)[0, :, 34, 34]
    for distance, seen in ((-reach[0] - 1, False), (reach[1] + 1, False), (-reach[0], True), (reach[1], True)):
        changed = image.clone()
        if not 0 <= 34 + distance < 70:
            continue
        changed[..., 34 + distance, :] += 5.0
        assert torch.equal(net(changed)[0, :, 34, 34], at) != seen


@torch.no_grad()
def test_equal_students_do_not_disagree_and_a_student_that_knows_the_target_does_not_err():
    net = scaled(network(students=2))
    for name, students in net.students.items():
        for student in students:
            own = net.teachers[name].state_dict()
            student.load_state_dict({key: value for key, value in own.items() if not key.startswith("decode")})
    for reading in net(torch.rand(2, 3, 20, 24)):
        assert reading.error.shape == (2, 20, 24)
        assert reading.error.max() < 1e-9
        assert reading.variance.max() < 1e-9


@torch.no_grad()
def test_error_and_variance_are_those_of_the_papers_formulas():
    net = scaled(network(students=3))
    images = torch.rand(1, 3, 20, 24)
    for size, reading in zip(net.patch_sizes, net(images), strict=True):
        outputs = np.stack([s(images).double().numpy() for s in net.students[str(size)]])
        target = net.normalised(size, images).double().numpy()
        error = ((outputs.mean(0) - target) ** 2).sum(1)
        variance = (outputs**2).sum(2).mean(0) - (outputs.mean(0) ** 2).sum(1)
        np.testing.assert_allclose(reading.error, error, rtol=1e-4)
        np.testing.assert_allclose(reading.variance, variance, rtol=1e-3, atol=1e-7)


def test_a_single_student_has_no_variance_to_add():
    errors, variances = (net := scaled(network(students=1))).scaled(net(torch.rand(1, 3, 20, 20)))
    assert len(errors) == 2
    assert variances == []


def test_a_model_without_statistics_refuses_to_score():
    net = network()
    with pytest.raises(ValueError, match="give a checkpoint"):
        net.scaled(net(torch.rand(1, 3, 20, 20)))


def test_only_students_are_trained_and_each_as_if_it_were_alone():
    net = scaled(network())
    together = torch.stack(
        [loss for size in net.patch_sizes for loss in net.student_losses(size, torch.ones(1, 3, 20, 20))]
    )
    together.sum().backward()
    assert all(p.grad is not None for p in net.students.parameters())
    assert all(p.grad is None and not p.requires_grad for p in net.teachers.parameters())
    kept = [p.grad.clone() for p in net.students["17"][1].parameters()]
    net.zero_grad()
    net.student_losses(17, torch.ones(1, 3, 20, 20))[1].backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(kept, net.students["17"][1].parameters(), strict=True))


def test_streamed_moments_are_those_of_all_values():
    values = torch.randn(4, 1000, dtype=torch.float64) * 3 + 100
    found = us.merged(
        [us.merged([us.moments(values[:, :10]), us.moments(values[:, 10:11])]), us.moments(values[:, 11:])]
    )
    mean, std = us.mean_and_std(found)
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, values.std(1, correction=0), rtol=1e-12, atol=0)


def test_constant_descriptors_leave_the_compactness_and_its_gradient_finite():
    vectors = torch.randn(6, 4)
    vectors[:, 2] = 0.5
    vectors.requires_grad_()
    loss = us.compactness_loss(vectors, "dims")
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize(("size", "count"), [(17, 2_996_480), (33, 1_616_000), (65, 2_320_640)])
def test_networks_have_the_published_sizes(size, count):
    with torch.device("meta"):
        net = us.US(512, patch_sizes=(size,))
    assert sum(p.numel() for p in net.students.parameters()) == 3 * count
    assert sum(p.numel() for p in net.teachers.parameters()) == count + 66_048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_sizes": (17, 19)}, "17, 33 and 65"),
        ({"patch_sizes": ()}, "one or more"),
        ({"students": 0}, "at least one"),
        ({"target": "features"}, "descriptor, decoded"),
        ({"padding": "same"}, "zeros, reflect"),
        ({"widths": {33: (4, 5)}}, "4 numbers, one per convolution"),
        ({"widths": {21: (4, 5)}}, "there are 17, 33 and 65"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
