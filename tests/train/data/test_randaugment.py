"""RandAugment: every operation gives timm's pixels, and a policy draws as timm's does."""

import numpy as np
import pytest
from PIL import Image

from paths import TESTS
from train.data.augment.random_augment import OPERATIONS, Operation, RandAugment, apply_operation

GOLDEN = np.load(TESTS / "golden" / "randaugment.npz")
FILL = (124, 116, 104)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_pixels_equal_timms_for_every_operation_magnitude_direction_and_filter(name):
    rows = np.flatnonzero(GOLDEN["names"] == name)
    assert rows.size, "the golden file has no such operation"
    for row in rows:
        operation = Operation(
            name, float(GOLDEN["magnitudes"][row]), bool(GOLDEN["negatives"][row]), int(GOLDEN["resamples"][row])
        )
        for image, expected in zip(GOLDEN["images"], GOLDEN["results"][row]):
            result = np.asarray(apply_operation(Image.fromarray(image), operation, FILL))
            np.testing.assert_array_equal(result, expected, err_msg=str(operation))


def test_golden_operations_distinguish_directions_and_filters():
    """Otherwise the test above would pass for an operation that ignores its arguments."""
    moving = np.array([str(name).startswith(("Rotate", "Shear", "Translate")) for name in GOLDEN["names"]])
    strong = moving & (GOLDEN["magnitudes"] == 9.0)
    for name in np.unique(GOLDEN["names"][strong]):
        results = GOLDEN["results"][strong & (GOLDEN["names"] == name)]
        assert len({result.tobytes() for result in results}) == 4, name


def test_operation_sets_are_timms():
    assert sorted(RandAugment.from_notation("rand-m9-inc1").names) == sorted(GOLDEN["increasing"])
    assert sorted(RandAugment.from_notation("rand-m9").names) == sorted(GOLDEN["plain"])


@pytest.mark.parametrize("name", ["PosterizeIncreasing", "Posterize"])
def test_posterize_to_zero_bits_is_black(name):
    operation = Operation(name, 10.0 if name == "PosterizeIncreasing" else 0.0, False, 2)
    result = apply_operation(Image.fromarray(GOLDEN["images"][0]), operation, FILL)
    assert not np.asarray(result).any()


def test_notation_is_timms():
    policy = RandAugment.from_notation("rand-m9-mstd0.5-inc1")
    assert (policy.magnitude, policy.magnitude_std, policy.operations, policy.probability) == (9.0, 0.5, 2, 0.5)
    assert policy.increasing
    assert policy.magnitude_max == 10.0
    other = RandAugment.from_notation("rand-n3-m7-mstd101-p0.25-mmax8")
    assert (other.magnitude, other.magnitude_max, other.operations, other.probability) == (7.0, 8.0, 3, 0.25)
    assert np.isinf(other.magnitude_std)
    assert not other.increasing


def test_unknown_notation_is_refused():
    with pytest.raises(ValueError, match=r"'rand-m9-x3': 'x3' is unknown.*rand-m9-mstd0\.5-inc1"):
        RandAugment.from_notation("rand-m9-x3")
    with pytest.raises(ValueError, match="'augmix' is unknown"):
        RandAugment.from_notation("augmix-m3")


def test_draws_follow_the_policy():
    policy = RandAugment.from_notation("rand-m9-mstd0.5-inc1")
    rng = np.random.default_rng(0)
    images = 4000
    drawn = [policy.draw(rng) for _ in range(images)]
    operations = [operation for one in drawn for operation in one]
    # Two operations per image, each with probability 1/2: a binomial of 8000 with a standard deviation of 45.
    assert abs(len(operations) - images) < 5 * 45
    counts = np.array([sum(operation.name == name for operation in operations) for name in policy.names])
    expected = len(operations) / len(policy.names)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared of 14 degrees of freedom: p < 5e-5
    magnitudes = np.array([operation.magnitude for operation in operations])
    assert magnitudes.max() == 10.0  # clipped: 2.3 % of N(9, 0.5) lie above
    assert abs(np.mean(magnitudes == 10.0) - 0.0228) < 0.012
    assert abs(np.median(magnitudes) - 9.0) < 0.05
    assert abs(np.mean([operation.negative for operation in operations]) - 0.5) < 0.04
    assert {operation.resample for operation in operations} == {2, 3}


def test_same_generator_state_gives_the_same_image():
    policy = RandAugment.from_notation("rand-m9-mstd0.5-inc1", fill=FILL)
    image = Image.fromarray(GOLDEN["images"][0])
    results = [[policy(image, np.random.default_rng(seed)).tobytes() for seed in range(20)] for _ in range(2)]
    assert results[0] == results[1]
    assert len(set(results[0])) > 10


def test_greyscale_images_go_through_every_operation():
    image = Image.fromarray(GOLDEN["images"][0]).convert("L")
    for name in OPERATIONS:
        result = apply_operation(image, Operation(name, 9.0, True, 3), 104)
        assert (result.mode, result.size) == ("L", image.size), name
