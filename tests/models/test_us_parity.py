"""US must compute what the usual reimplementation's dense networks and the paper's formulas give: descriptors, statistics,
maps, the losses of teacher and students, and a student's first Adam steps.
"""

import pytest
import torch

from models import us
from models.head import AnomalyHead, HeadConfig

pytestmark = pytest.mark.parity("us")


class Recording:
    """A case, and the networks built and loaded as it says."""

    def __init__(self, case) -> None:
        self.case, self.options, self.sizes = case, case.hparams, case.hparams["patch_sizes"]

    def network(self, target: str = "descriptor", padding: str = "zeros") -> us.US:
        network = us.US(
            self.options["decoded"],
            patch_sizes=self.sizes,
            students=self.options["students"],
            target=target,
            widths={int(size): widths for size, widths in self.options["channels"].items()},
            padding=padding,
        )
        for size in self.sizes:
            parts = [(network.teachers[str(size)], f"state.teacher.{size}.")]
            parts += [(net, f"state.student.{size}.{n}.") for n, net in enumerate(network.students[str(size)])]
            for part, prefix in parts:
                part.load_state_dict({name: self.case.tensor(prefix + name) for name in part.state_dict()})
        return network

    @torch.no_grad()
    def measured(self, target: str = "descriptor") -> us.US:
        """The network with its targets' scale, from the training images, one by one."""
        network = self.network(target)
        for size in self.sizes:
            outputs = [network.output(network.teachers[str(size)], x) for x in self.case.tensor("train").split(1)]
            parts = [us.moments(output[0].flatten(1)) for output in outputs]
            network.scales[str(size)].set(*us.mean_and_std(us.merged(parts)))
        return network

    @torch.no_grad()
    def calibrated(self, network: us.US, images: torch.Tensor) -> us.US:
        parts = [
            us.moments(torch.stack([part.flatten() for reading in network(x) for part in reading]))
            for x in images.split(1)
        ]
        mean, std = us.mean_and_std(us.merged(parts))
        network.statistics.copy_(torch.stack([mean, std], dim=1).reshape(-1, 4))
        return network


@pytest.fixture
def recording(case) -> Recording:
    return Recording(case)


@torch.no_grad()
def test_dense_descriptors_are_the_recorded_ones(recording):
    images, found = recording.case.tensor("test"), {}
    for padding in ("zeros", "reflect"):
        teachers = recording.network(padding=padding).teachers
        for size in recording.sizes:
            if f"descriptor.{size}.{padding}" in recording.case.arrays:
                found[f"descriptor.{size}.{padding}"] = teachers[str(size)](images)
    recording.case.check(found)


@torch.no_grad()
def test_statistics_errors_variances_maps_and_scores_are_the_recorded_ones(recording):
    network, images, found = recording.measured(), recording.case.tensor("test"), {}
    recording.calibrated(network, recording.case.tensor("validation"))
    readings = network(images)
    errors, variances = network.scaled(readings)
    for number, size in enumerate(recording.sizes):
        scale = network.scales[str(size)]
        losses = network.student_losses(size, recording.case.tensor("train"))
        found |= {f"teacher_mean.{size}": scale.mean, f"teacher_std.{size}": scale.std}
        found |= {f"teacher_normalised.{size}": network.normalised(size, images)}
        found |= {f"student_loss.{size}": torch.stack(losses)}
        found |= {f"error.{size}": readings[number].error, f"variance.{size}": readings[number].variance}
        found |= {f"validation_stats.{size}": network.statistics[number]}
        found |= {f"scale_map.{size}": errors[number] + variances[number]}
    maps = [error + variance for error, variance in zip(errors, variances, strict=True)]
    scored = AnomalyHead(HeadConfig(fusion="mean", image_score="max")).score(maps, tuple(images.shape[-2:]))
    recording.case.check(found | {"map": scored.maps, "score": scored.image_scores})


@torch.no_grad()
def test_the_reimplementations_reading_gives_its_maps(recording):
    network, images, found = recording.measured("decoded"), recording.case.tensor("test"), {}
    recording.calibrated(network, recording.case.tensor("train"))
    errors, variances = network.scaled(network(images))
    for number, size in enumerate(recording.sizes):
        output = network.output(network.teachers[str(size)], images)
        found |= {f"reference_output.{size}": output.permute(0, 2, 3, 1)}
        found |= {f"reference_stats.{size}": network.statistics[number]}
        found |= {f"reference_map.{size}": errors[number] + variances[number]}
    recording.case.check(found)


def test_a_students_first_steps_are_the_recorded_ones(recording):
    network, size = recording.measured(), 33
    student = network.students[str(size)][0]
    options = {"lr": recording.options["lr"], "weight_decay": recording.options["weight_decay"]}
    optimizer = torch.optim.Adam(student.parameters(), **options)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    losses = []
    for number, image in enumerate(
        recording.case.tensor("train").split(1)[: len(recording.case.arrays["student_losses"])]
    ):
        optimizer.zero_grad()
        loss = network.student_losses(size, image)[0]
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        if number == 0:
            found = {f"student_grad.{name}": value.grad for name, value in student.named_parameters()}
            found |= {f"student_step.{name}": value - before[name] for name, value in student.named_parameters()}
            recording.case.check(found, 2e-3)
    assert losses[0].item() == pytest.approx(float(recording.case.arrays["student_losses"][0]), rel=1e-4)
    recording.case.check({"student_losses": torch.stack(losses)}, 2e-3)
    assert all(parameter.grad is None for parameter in network.teachers.parameters())


def test_the_teachers_losses_and_gradients_are_the_recorded_ones(recording):
    network = recording.network()
    teacher = network.teachers["33"].requires_grad_(True)
    names = dict(teacher.named_parameters())
    anchor, positive, negative = (
        teacher.patches(recording.case.tensor(f"patch.{p}")) for p in ("anchor", "positive", "negative")
    )
    decoded, target = teacher.decode(anchor), recording.case.tensor("patch.target")
    each = torch.stack([us.triplet_loss(*(x[n : n + 1] for x in (anchor, positive, negative)), recording.options["delta"])
                        for n in range(len(anchor))])  # fmt: skip
    distillation = us.distillation_loss(decoded, target)
    triplet = us.triplet_loss(anchor, positive, negative, recording.options["delta"])
    dims = us.compactness_loss(anchor, "dims")
    total = distillation + dims
    activated = teacher.decoded(anchor)
    last_activated = torch.nn.functional.leaky_relu(
        decoded, recording.options["slope"]
    )  # what this one was recorded on
    found = {
        "teacher.descriptor": anchor,
        "teacher.decoded": decoded,
        "loss.distillation": distillation,
        "loss.triplet": triplet,
        "loss.triplet_each": each,
        "loss.compactness.dims_squared": dims,
        "loss.compactness.samples_squared": us.compactness_loss(anchor, "samples"),
        "loss.compactness.reference_decoded": us.compactness_loss(last_activated, "samples"),
        "loss.distillation.reference": us.distillation_loss(activated, target),
        "loss.total": total,
        "loss.total_with_triplet": total + triplet,
    }
    for kind, loss in (("teacher_grad", total), ("teacher_grad_triplet", total + triplet)):
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
        found |= {f"{kind}.{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    recording.case.check(found)
