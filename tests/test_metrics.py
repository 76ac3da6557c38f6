"""Scores from features: closed forms, and torch-fidelity's own results by the same extractor."""

import numpy as np
import pytest
import torch
from inceptions import Small, write_random_inception

from diffusion.build.parts import metrics
from diffusion.config.metrics import known, names
from diffusion.metrics import reference as references
from diffusion.metrics.extractors import CHUNK, Extractor, Features, inception
from diffusion.metrics.frechet import fid_by_class
from diffusion.metrics.inception_score import inception_score
from diffusion.metrics.metric import scores
from diffusion.metrics.moments import BLOCK, Moments, frechet
from diffusion.metrics.nearest import nearest
from diffusion.metrics.published.place import against_real, of_samples
from diffusion.metrics.reference import Reference, kept_numbers, path_of, store, stored
from diffusion.metrics.takes import Takes


def pictures(count: int, seed: int, size: int = 32) -> torch.Tensor:
    """uint8 (N, 3, size, size): smooth noise, so that images differ from each other."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def reference(features: torch.Tensor, labels: torch.Tensor | None = None) -> Reference:
    return Reference(Moments.of(features), features, torch.arange(len(features)), labels)


def small_extractor() -> Extractor:
    return Extractor("small", Small(), Takes(3), "0" * 64)


# ---- moments and FID ----


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_of_two_gaussians_is_the_closed_form(seed):
    """With common axes: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2 over the variances."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    axes, _ = torch.linalg.qr(draw(24, 24))
    a, b, m, n = draw(24) ** 2, draw(24) ** 2, 3 * draw(24), draw(24)
    ours, theirs = (Moments.given(mean, axes @ v.diag() @ axes.T, 1000) for mean, v in ((m, a), (n, b)))
    exact = (m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet(ours, theirs) == pytest.approx(float(exact), rel=1e-6)
    assert abs(frechet(ours, ours)) < 1e-6


def test_moments_are_mean_and_covariance_whoever_adds_them_up():
    x = torch.randn(BLOCK + 700, 9, generator=torch.Generator().manual_seed(1)) * 3 + 5
    moments = Moments.of(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T), rtol=1e-10, atol=1e-10)
    again = Moments.joined([Moments.of_block(x[:BLOCK]), Moments.of_block(x[BLOCK:])])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(moments, again, strict=True))


# ---- against torch-fidelity ----


class Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.images[number]


def by_fidelity(images: torch.Tensor, real: torch.Tensor, subset: int, **chosen) -> dict[str, float]:
    """torch-fidelity's own calculate_metrics, by our names."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Images(images), input2=Images(real), cuda=False, isc=True, fid=True, kid=True, prc=True, verbose=False,
        kid_subset_size=subset, cache=False, save_cpu_ram=False, **chosen,
    )  # fmt: skip
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean", "is_std": "inception_score_std"}
    names |= {"kid": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std"}
    return {ours: found[theirs] for ours, theirs in (names | {"precision": "precision", "recall": "recall"}).items()}


def ours_by(extractor: Extractor, images: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    batches = lambda all_of: all_of.split(25)  # noqa: E731
    theirs = reference(extractor(batches(real)).pooled)
    found = scores(metrics(["fid", "is", "kid", "precision", "recall"]), extractor(batches(images)), theirs)
    return {key: value for values in found.values() for key, value in values.items()}


def test_scores_are_those_of_torch_fidelity_by_the_same_network():
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = Small()

        def forward(self, images):
            return tuple(
                dict(zip(("pooled", "logits"), self.network(images), strict=True))[f] for f in self.features_list
            )

        @staticmethod
        def get_provided_features_list():
            return ("pooled", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pooled"

    register_feature_extractor("small", Registered)
    images, real = pictures(64, 1), pictures(60, 2)
    layers = {f"feature_layer_{metric}": "pooled" for metric in ("fid", "kid", "prc")}
    wanted = by_fidelity(images, real, 60, feature_extractor="small", feature_layer_isc="logits", **layers)
    found = ours_by(small_extractor(), images, real)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow  # two networks of 24M parameters, images of 299 x 299 pixels
def test_scores_are_those_of_torch_fidelity_by_inception(tmp_path):
    weights = write_random_inception(tmp_path / "inception.pth")
    images, real = pictures(64, 1), pictures(64, 2) // 4 * 3  # apart: 64 images leave a root of rank 63 of 2,048
    layers = {"fid": "2048", "kid": "2048", "prc": "2048", "isc": "logits_unbiased"}
    layers = {f"feature_layer_{metric}": layer for metric, layer in layers.items()}
    chosen = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(weights)}
    wanted = by_fidelity(images, real, 64, **chosen, **layers)
    found = ours_by(inception(str(weights)), images, real)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_the_inception_score_is_its_definition():
    logits = 5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
    shuffled = logits[np.random.RandomState(2020).permutation(64)].double()
    p = (shuffled - shuffled.logsumexp(1, keepdim=True)).exp()
    parts = [p[i * 64 // 10 : (i + 1) * 64 // 10] for i in range(10)]
    values = [float((q * (q.log() - q.mean(0).log())).sum(1).mean().exp()) for q in parts]
    found = inception_score(Features(torch.zeros(64, 2), logits))
    assert found["is"] == pytest.approx(np.mean(values), rel=1e-9)
    assert found["is_std"] == pytest.approx(np.std(values), rel=1e-7)
    assert 2 < found["is"] < 10


@pytest.mark.parametrize("name", [name for name in names() if not known(name).from_model])
def test_a_metric_is_computed_of_as_many_images_as_its_class_says(name):
    """And what is known of it without importing it is what its class says."""
    (metric,), said = metrics([name]).values(), known(name)
    for key in ("title", "least_images", "least_real", "compares", "least_classes", "from_model", "beside"):
        assert getattr(metric, key) == getattr(said, key, getattr(metric, key)), key
    assert (of_samples({"name": name}), against_real({"name": name})) == (True, metric.compares)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    least, real = said.least_images, max(said.real_images, 1)
    assert np.isfinite(scores({name: metric}, Features(x[:least], x[:least]), reference(x[:real]))[name][name])
    with pytest.raises(ValueError, match=f"{metric.title} of {least - 1} image.*at least {least} "):
        scores({name: metric}, Features(x[: least - 1], x[: least - 1]), reference(x))
    if metric.compares:
        with pytest.raises(ValueError, match=f"against {real - 1} real image.*at least {real} "):
            scores({name: metric}, Features(x, x), reference(x[: real - 1]))


def test_a_likelihood_is_no_score_of_samples():
    assert known("bits_per_dim").from_model and not of_samples({"name": "bits_per_dim"})
    assert not against_real({"name": "bits_per_dim"}) and known("bits_per_dim").real_images == 0


# ---- extractors ----


def test_features_do_not_depend_on_how_images_are_batched():
    extractor, images = small_extractor(), pictures(150, 5)
    whole = extractor.rows(images, 0)
    for size in (1, 7, CHUNK, 100):
        parts = extractor(images.split(size))
        assert torch.equal(parts.pooled, whole.pooled) and torch.equal(parts.logits, whole.logits), size


def test_features_that_are_not_finite_are_refused():
    network = Small()
    network.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="extractor=broken gives features that are not finite"):
        Extractor("broken", network, Takes(3), "")([pictures(3, 0)])


@pytest.mark.slow
def test_inceptions_features_do_not_depend_on_how_images_are_batched(tmp_path):
    extractor = inception(str(write_random_inception(tmp_path / "inception.pth")))
    images = pictures(70, 5)
    parts, whole = extractor(images.split(33)), extractor.rows(images, 0)
    assert torch.equal(parts.pooled, whole.pooled) and torch.equal(parts.logits, whole.logits)


# ---- the reference, kept ----

ABOUT = {"extractor": "small", "extractor_sha256": "a", "data": "b", "split": "train", "image_size": 32, "images": 9}


@pytest.fixture
def kept(tmp_path):
    made = reference(torch.randn(9, 5), torch.arange(9) % 3)
    path = path_of(tmp_path, ABOUT)
    store(path, ABOUT, made)
    return path, made


def test_a_reference_comes_back_to_the_bit(kept):
    path, made = kept
    back = stored(path, ABOUT)
    assert torch.equal(back.features, made.features) and torch.equal(back.labels, made.labels)
    assert back.moments.count == 9 and torch.equal(back.moments.products, made.moments.products)


@pytest.mark.parametrize("key", sorted(ABOUT))
def test_a_reference_is_used_for_nothing_else(kept, key):
    other = ABOUT | {key: "other"}
    assert path_of(kept[0].parent, other) != kept[0]
    assert stored(kept[0], other) is None  # also under the name of the other


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_damaged_reference_is_not_used(kept, place):
    path, _ = kept
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert stored(path, ABOUT) is None
    path.write_bytes(data[: len(data) // 2])
    assert stored(path, ABOUT) is None


def test_kept_images_are_spread_evenly():
    assert kept_numbers(7).tolist() == list(range(7))
    assert kept_numbers(1000, 10).tolist() == list(range(0, 1000, 100))


def test_the_floor_is_the_distance_of_real_images_and_falls_with_their_number():
    real = reference(torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)))
    few, many = real.floor(40), real.floor(800)
    assert 0 < many.value < few.value / 5 and 0 < many.std < many.value
    assert real.floor(5000).images == 1000 and references.DRAWS > 2
    # to first order E FID = (d + d (d + 1) / 4) (1 / n + 1 / m) for unit Gaussians of d dimensions
    assert few.value == pytest.approx(9 * (1 / 40 + 1 / 1960), rel=0.5)
    assert many.value == pytest.approx(9 * (1 / 800 + 1 / 1200), rel=0.5)


# ---- copies, classes ----


def test_copies_are_near_and_new_images_are_not():
    generator = torch.Generator().manual_seed(0)
    real, new = (torch.randn(600, 6, generator=generator) for _ in range(2))
    of = lambda x: nearest(Features(x, x), reference(real))["nearest"]  # noqa: E731
    assert of(real[:200]) == 0
    assert of(new[:200]) == pytest.approx(1, abs=0.15)
    assert of(3 * new[:200]) > 1.5


def test_fid_by_class_sees_the_class_that_is_off():
    real, labels = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3
    ours = torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    ours[labels == 1] += 4
    found = fid_by_class(Features(ours, ours), labels, reference(real, labels))
    assert found[1] == pytest.approx(48, rel=0.1) and max(found[0], found[2]) < 1
    found = fid_by_class(Features(ours[:4], ours[:4]), labels[:4], reference(real, labels))
    assert found[1] is None and found[2] is None
