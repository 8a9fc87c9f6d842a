"""The data sets: what is drawn, and what is read from the folders that users have."""

from __future__ import annotations

import dataclasses
import doctest
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import once
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl_defense import datasets
from keras_tl_defense.datasets import ImageDataset, base, faces, gtsrb, synthetic

pytestmark = once

LOADERS = {"signs": synthetic.load_signs, "shapes": synthetic.load_shapes}
CLASSES = {"signs": 16, "shapes": 28}
both = pytest.mark.parametrize("name", LOADERS)


@pytest.fixture(scope="module")
def signs() -> ImageDataset:
    return synthetic.load_signs(train_per_class=40, test_per_class=10)


@pytest.fixture(scope="module")
def shapes() -> ImageDataset:
    return synthetic.load_shapes(train_per_class=30, test_per_class=5)


def nearest(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The labels of the nearest known vectors."""
    known, asked = known.reshape(len(known), -1), asked.reshape(len(asked), -1)
    distance = (known**2).sum(1) - 2 * asked @ known.T
    return labels[distance.argmin(1)]


def mean_colour(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1, 3).mean(1)


def contrast(images: np.ndarray) -> np.ndarray:
    """Edges without colour: what is left of an image when paint and light are taken away."""
    grey = images.astype(float).mean(-1)
    edges = np.abs(np.diff(grey, axis=1))[:, :, :-1] + np.abs(np.diff(grey, axis=2))[:, :-1]
    pooled = edges[:, :30, :30].reshape(len(edges), 10, 3, 10, 3).mean((2, 4)).reshape(-1, 100)
    return (pooled - pooled.mean(1, keepdims=True)) / pooled.std(1, keepdims=True)


class TestImageDataset:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    labels = np.array([0, 1])

    def make(self, **changes: Any) -> ImageDataset:
        fields: dict[str, Any] = {
            "x_train": self.images,
            "y_train": self.labels,
            "x_test": self.images,
            "y_test": self.labels,
            "class_names": ("a", "b"),
        }
        return ImageDataset(**{**fields, **changes})

    def test_properties(self) -> None:
        dataset = self.make(track_train=np.array([0, 0]))
        assert dataset.classes == 2
        assert dataset.image_shape == (8, 8, 3)
        assert "classes=2" in repr(dataset)
        with pytest.raises(dataclasses.FrozenInstanceError):
            dataset.class_names = ()  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_test": images.astype(float)}, "`x_test` is not a batch.*x_test.dtype=float64"),
            ({"x_train": images[..., 0]}, r"x_train.shape=\(2, 8, 8\)"),
            ({"y_train": labels.astype("int32")}, "y_train.dtype=int32"),
            ({"y_train": labels[:1]}, r"each of 2 inputs.*y_train.shape=\(1,\)"),
            ({"track_train": labels[:1]}, "`track_train` does not fit"),
            ({"class_names": ("a",)}, r"`y_train` holds a label.*0\.\.0;.*labels in 0\.\.1"),
            ({"y_test": labels - 1}, r"`y_test` holds a label.*labels in -1\.\.0"),
            ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, r"differ in size.*\(2, 9, 9, 3\)"),
        ],
    )
    def test_refuses(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


class TestResize:
    def test_right_size_is_left_alone(self) -> None:
        images = np.zeros((3, 16, 16, 3), np.uint8)
        assert base.resize_images(images, 16) is images

    def test_halving_a_doubled_image_gives_it_back(self, signs: ImageDataset) -> None:
        doubled = signs.x_test.repeat(2, axis=1).repeat(2, axis=2)
        halved = base.resize_images(doubled, 32)
        assert halved.dtype == np.uint8
        assert np.abs(halved.astype(int) - signs.x_test).mean() < 6

    def test_fine_stripes_are_smoothed_away(self) -> None:
        stripes = np.zeros((1, 64, 64, 3), np.uint8)
        stripes[:, :, 0::4] = stripes[:, :, 3::4] = 200  # every pixel that plain sampling reads
        small = base.resize_images(stripes, 8).astype(int)
        assert np.abs(small - 100).max() <= 20

    def test_many_images_like_one(self, signs: ImageDataset) -> None:
        together = base.resize_images(signs.x_train, 20)
        for index in (0, 255, 256, 639):
            alone = base.resize_images(signs.x_train[index : index + 1], 20)[0]
            np.testing.assert_array_equal(together[index], alone)


class TestSynthetic:
    @both
    def test_shapes_and_labels(self, name: str, request: pytest.FixtureRequest) -> None:
        dataset = request.getfixturevalue(name)
        train, test = len(dataset.x_train), len(dataset.x_test)
        assert dataset.classes == CLASSES[name] == len(set(dataset.class_names))
        assert dataset.x_train.shape == (train, 32, 32, 3)
        assert dataset.x_train.dtype == dataset.x_test.dtype == np.uint8
        assert set(np.bincount(dataset.y_train)) == {train // CLASSES[name]}
        assert set(np.bincount(dataset.y_test)) == {test // CLASSES[name]}
        assert dataset.track_train is None
        assert dataset.x_train.min() == 0
        assert dataset.x_train.max() == 255

    def test_families_share_no_class(self, signs: ImageDataset, shapes: ImageDataset) -> None:
        assert not set(signs.class_names) & set(shapes.class_names)

    @both
    def test_same_seed_same_images(self, name: str) -> None:
        first, again, other = (LOADERS[name](2, 1, seed=seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first.x_train, again.x_train)
        np.testing.assert_array_equal(first.x_test, again.x_test)
        changed = (first.x_train != other.x_train).any(axis=(1, 2, 3))
        assert changed.all()

    @both
    def test_no_two_images_are_equal(self, name: str, request: pytest.FixtureRequest) -> None:
        dataset = request.getfixturevalue(name)
        everything = np.concatenate([dataset.x_train, dataset.x_test])
        assert len({image.tobytes() for image in everything}) == len(everything)

    @both
    @settings(max_examples=4, deadline=None)
    @given(train=st.integers(1, 4), test=st.integers(1, 3))
    def test_image_does_not_depend_on_the_counts(self, name: str, train: int, test: int) -> None:
        few, many = LOADERS[name](train, test, size=16), LOADERS[name](4, 3, size=16)
        for part, count in (("x_train", train), ("x_test", test)):
            shape = (CLASSES[name], -1, 16, 16, 3)
            expected = getattr(many, part).reshape(shape)[:, :count]
            np.testing.assert_array_equal(getattr(few, part).reshape(shape), expected)

    def test_same_scene_at_another_size(self) -> None:
        small, large = (synthetic.load_signs(4, 1, size=size).x_train for size in (32, 96))
        shrunk = base.resize_images(large, 32).astype(float)
        vectors = [batch.reshape(64, -1) for batch in (small.astype(float), shrunk)]
        same = [np.corrcoef(one, other)[0, 1] for one, other in zip(*vectors, strict=True)]
        assert np.median(same) > 0.9

    def test_signs_are_told_apart_but_not_trivially(self, signs: ImageDataset) -> None:
        means = np.stack([signs.x_train[signs.y_train == c].mean(0) for c in range(16)])
        found = nearest(means, np.arange(16), signs.x_test.astype(float))
        assert 2.5 / 16 < (found == signs.y_test).mean() < 0.7
        found = nearest(contrast(signs.x_train), signs.y_train, contrast(signs.x_test))
        assert 4 / 16 < (found == signs.y_test).mean() < 0.98

    def test_pictogram_tells_what_colour_does_not(self, signs: ImageDataset) -> None:
        round_signs = ("limit 2", "limit 4", "limit 7", "no passing")
        chosen = [signs.class_names.index(name) for name in round_signs]
        train, test = np.isin(signs.y_train, chosen), np.isin(signs.y_test, chosen)
        x, y, asked, answer = (
            signs.x_train[train],
            signs.y_train[train],
            signs.x_test[test],
            signs.y_test[test],
        )
        by_colour = nearest(mean_colour(x), y, mean_colour(asked)) == answer
        by_form = nearest(contrast(x), y, contrast(asked)) == answer
        assert by_colour.mean() < 0.45
        assert by_form.mean() > 0.5

    def test_shapes_are_told_apart_by_form_only(self, shapes: ImageDataset) -> None:
        by_colour = nearest(mean_colour(shapes.x_train), shapes.y_train, mean_colour(shapes.x_test))
        by_form = nearest(contrast(shapes.x_train), shapes.y_train, contrast(shapes.x_test))
        assert (by_colour == shapes.y_test).mean() < 3 / 28
        assert 5 / 28 < (by_form == shapes.y_test).mean() < 0.98

    @both
    @pytest.mark.parametrize(
        "wrong",
        [
            {"train_per_class": 0},
            {"test_per_class": -1},
            {"size": 7},
            {"size": 32.0},
            {"seed": -1},
            {"train_per_class": True},
        ],
    )
    def test_refuses(self, name: str, wrong: dict[str, Any]) -> None:
        ((argument, value),) = wrong.items()
        message = f"`{argument}` must be an integer of at least .* Received: {argument}={value!r}"
        with pytest.raises(ValueError, match=message):
            LOADERS[name](**wrong)


def write_ppm(path: Path, image: np.ndarray) -> None:
    """Write a binary PPM by hand, so that the reader is not checked against its own library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = image.shape
    path.write_bytes(f"P6\n{width} {height}\n255\n".encode() + image.tobytes())


def write_labels(path: Path, labels: dict[str, int]) -> None:
    rows = [f"{name};32;32;5;5;27;27;{label}" for name, label in labels.items()]
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    path.write_text("\r\n".join([header, *rows, ""]))


@pytest.fixture
def official(tmp_path: Path, signs: ImageDataset) -> Path:
    """The benchmark's folders: classes 0, 1 and 42, two tracks of four frames each."""
    for label, sign in ((0, 0), (1, 1), (42, 2)):
        folder = tmp_path / "Final_Training" / "Images" / f"{label:05d}"
        for track in range(2):
            for frame in range(4):
                image = signs.x_train[40 * sign + 4 * track + frame]
                write_ppm(folder / f"{track:05d}_{frame:05d}.ppm", image)
        (folder / f"GT-{label:05d}.csv").write_text("Filename;Width\n")
    for index in range(3):
        write_ppm(tmp_path / "Final_Test" / "Images" / f"{index:05d}.ppm", signs.x_test[index])
    labels = {"00002.ppm": 42, "00000.ppm": 7, "00001.ppm": 0}
    write_labels(tmp_path / "Final_Test" / "Images" / "GT-final_test.csv", labels)
    return tmp_path


class TestGtsrbFolders:
    def test_reads_the_official_layout(self, official: Path, signs: ImageDataset) -> None:
        dataset = gtsrb.load(official)
        expected = np.concatenate([signs.x_train[40 * sign :][:8] for sign in range(3)])
        np.testing.assert_array_equal(dataset.x_train, expected)
        np.testing.assert_array_equal(dataset.y_train, np.repeat([0, 1, 42], 8))
        np.testing.assert_array_equal(dataset.track_train, np.repeat(np.arange(6), 4))
        np.testing.assert_array_equal(dataset.x_test, signs.x_test[[2, 0, 1]])
        np.testing.assert_array_equal(dataset.y_test, [42, 7, 0])
        assert dataset.y_train.dtype == dataset.y_test.dtype == np.int64

    def test_names_the_classes(self, official: Path) -> None:
        names = gtsrb.load(str(official)).class_names
        assert len(names) == len(set(names)) == 43
        assert [names[label] for label in (0, 8, 14, 17, 25, 38)] == [
            "speed limit 20 km/h",
            "speed limit 120 km/h",
            "stop",
            "no entry",
            "road works",
            "keep right",
        ]

    def test_outer_folder(self, official: Path) -> None:
        expected = gtsrb.load(official)
        outer = official / "GTSRB"
        outer.mkdir()
        for part in ("Final_Training", "Final_Test"):
            (official / part).rename(outer / part)
        found = gtsrb.load(official)
        np.testing.assert_array_equal(found.x_train, expected.x_train)
        np.testing.assert_array_equal(found.y_test, expected.y_test)

    @pytest.mark.parametrize("place", ["Final_Test/Images", "Final_Test", "."])
    @pytest.mark.parametrize("outer", ["", "GTSRB"])
    def test_test_classes_in_any_place(self, official: Path, place: str, outer: str) -> None:
        inside = official / "Final_Test" / "Images"
        (inside / "GT-final_test.csv").rename(official / place / "GT-final_test.csv")
        (inside / "GT-final_test.test.csv").write_text("Filename;Width\n00000.ppm;32\n")
        if outer:
            (official / outer).mkdir()
            for part in ("Final_Training", "Final_Test"):
                (official / part).rename(official / outer / part)
        assert gtsrb.load(official).y_test.tolist() == [42, 7, 0]

    def test_labelled_file_wins_over_unlabelled(self, official: Path) -> None:
        inside = official / "Final_Test" / "Images" / "GT-final_test.csv"
        inside.rename(official / "GT-final_test.csv")
        inside.write_text("Filename;Width\n00000.ppm;32\n")
        assert gtsrb.load(official).y_test.tolist() == [42, 7, 0]

    def test_frames_are_evenly_spaced(self, official: Path) -> None:
        every = gtsrb.load(official, frames_per_track=None)
        half = gtsrb.load(official, frames_per_track=2)
        kept = [8 * sign + frame for sign in range(3) for frame in (1, 3, 5, 7)]
        np.testing.assert_array_equal(half.x_train, every.x_train[kept])
        np.testing.assert_array_equal(half.track_train, np.repeat(np.arange(6), 2))

    def test_resizes_whole_frames_of_any_size(self, official: Path) -> None:
        folder = official / "Final_Training" / "Images" / "00000"
        for index, (height, width) in enumerate([(15, 15), (48, 31), (120, 200), (250, 40)]):
            left_right = np.zeros((height, width, 3), np.uint8)
            left_right[:, : width // 2] = (200, 100, 50)
            write_ppm(folder / f"00000_{index:05d}.ppm", left_right)
        images = gtsrb.load(official, size=24).x_train[:4].astype(int)
        assert images.shape == (4, 24, 24, 3)
        assert np.abs(images[:, :, :8] - (200, 100, 50)).max() <= 3
        assert np.abs(images[:, :, 16:]).max() <= 3

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such folder.*Received: root='.*nowhere'"):
            gtsrb.load(tmp_path / "nowhere")

    def test_neither_layout(self, tmp_path: Path) -> None:
        message = "Expected the file gtsrb32.npz, or the folder Final_Training.Images or GTSRB"
        with pytest.raises(FileNotFoundError, match=message):
            gtsrb.load(tmp_path)

    def test_no_training_images(self, official: Path) -> None:
        shutil.rmtree(official / "Final_Training")
        (official / "Final_Training" / "Images").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="training images holds none"):
            gtsrb.load(official)

    def test_unlabelled_test_classes(self, official: Path) -> None:
        path = official / "Final_Test" / "Images" / "GT-final_test.csv"
        path.write_text("Filename;Width;Height\n00000.ppm;32;32\n")
        message = "Expected the columns Filename and ClassId.*GT-final_test.test.csv is the one"
        with pytest.raises(ValueError, match=message) as caught:
            gtsrb.load(official)
        assert str(path) in str(caught.value)
        assert "columns=['Filename', 'Width', 'Height']" in str(caught.value)

    def test_no_test_classes(self, official: Path) -> None:
        path = official / "Final_Test" / "Images" / "GT-final_test.csv"
        path.rename(path.with_name("GT-final_test.test.csv"))
        with pytest.raises(FileNotFoundError, match=r"test\.csv has no classes.*Received: root="):
            gtsrb.load(official)

    @pytest.mark.filterwarnings("ignore:The legacy:DeprecationWarning")  # imageio tries them all
    @pytest.mark.parametrize("damage", ["cut short", "not an image", "grey", "missing"])
    def test_unreadable_image(self, official: Path, damage: str) -> None:
        path = official / "Final_Test" / "Images" / "00001.ppm"
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            grey = b"P5\n8 8\n255\n" + bytes(64)
            text = b"nothing to see"
            path.write_bytes({"cut short": whole[:500], "grey": grey}.get(damage, text))
        with pytest.raises(ValueError, match=r"The image .*00001.ppm cannot be read.*path=") as why:
            gtsrb.load(official)
        assert str(path) in str(why.value)

    def test_class_beyond_the_benchmark(self, official: Path) -> None:
        images = official / "Final_Training" / "Images"
        (images / "00042").rename(images / "00043")
        with pytest.raises(ValueError, match=r"label without a class name.*0\.\.42"):
            gtsrb.load(official)

    @pytest.mark.parametrize("wrong", [{"size": 0}, {"frames_per_track": 0}])
    def test_refuses(self, official: Path, wrong: dict[str, int]) -> None:
        ((argument, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"Received: {argument}={value}"):
            gtsrb.load(official, **wrong)


def write_pack(path: Path, frames: np.ndarray, labels: object, tracks: object) -> None:
    np.savez(
        path,
        x_train=frames,
        y_train=np.asarray(labels),
        track_train=np.asarray(tracks, "int32"),
        x_test=frames[:2],
        y_test=np.array([1, 0]),
    )


class TestGtsrbPack:
    def test_tracks_of_classes_are_told_apart(self, tmp_path: Path, signs: ImageDataset) -> None:
        labels, tracks = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]
        write_pack(tmp_path / "gtsrb32.npz", signs.x_train[:8], labels, tracks)
        dataset = gtsrb.load(tmp_path)
        np.testing.assert_array_equal(dataset.x_train, signs.x_train[:8])
        np.testing.assert_array_equal(dataset.y_train, labels)
        np.testing.assert_array_equal(dataset.track_train, [0, 0, 1, 1, 2, 2, 3, 3])
        np.testing.assert_array_equal(dataset.y_test, [1, 0])
        assert gtsrb.load(tmp_path, size=20).image_shape == (20, 20, 3)

    @settings(max_examples=40, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 31), min_size=1, max_size=4),
        wanted=st.none() | st.integers(1, 31),
    )
    def test_spacing(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        lengths: list[int],
        wanted: int | None,
    ) -> None:
        folder = tmp_path_factory.mktemp("pack")
        numbers = np.concatenate([np.arange(length) for length in lengths])
        frames = np.zeros((len(numbers), 8, 8, 3), np.uint8) + numbers[:, None, None, None]
        tracks = np.repeat(np.arange(len(lengths)), lengths)
        write_pack(folder / "gtsrb32.npz", frames.astype(np.uint8), 0 * tracks, tracks)
        if len(numbers) == 1:
            return  # the pack's test part takes two images
        dataset = gtsrb.load(folder, size=8, frames_per_track=wanted)
        assert dataset.track_train is not None
        for track, length in enumerate(lengths):
            kept = dataset.x_train[dataset.track_train == track, 0, 0, 0].astype(int)
            assert len(kept) == min(length, wanted or length)
            gaps = np.diff(kept)
            assert (gaps > 0).all()
            assert len(gaps) == 0 or np.ptp(gaps) <= 1
            assert abs(kept[0] - (length - 1 - kept[-1])) <= 1

    def test_pack_lacks_an_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "gtsrb32.npz", x_train=np.zeros(1))
        with pytest.raises(ValueError, match=r"lacks \['y_train', .*arrays=\['x_train'\]"):
            gtsrb.load(tmp_path)


class TestFaces:
    def write(self, folder: Path, **changes: object) -> np.ndarray:
        images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
        people = np.array([0, 1, 2, 0, 1, 2])
        arrays = {"x_train": images, "y_train": people, "x_test": images[:3], "y_test": people[:3]}
        np.savez(folder / "lfw64.npz", **{**arrays, **changes})  # type: ignore[arg-type]
        return images

    def test_reads(self, tmp_path: Path) -> None:
        images = self.write(tmp_path)
        dataset = faces.load(tmp_path)
        np.testing.assert_array_equal(dataset.x_train, images)
        np.testing.assert_array_equal(dataset.y_test, [0, 1, 2])
        assert dataset.class_names == ("person 0", "person 1", "person 2")
        assert faces.load(str(tmp_path), size=32).x_test.shape == (3, 32, 32, 3)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such folder.*root='.*nowhere'"):
            faces.load(tmp_path / "nowhere")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no lfw64\.npz in the folder.*Received: root"):
            faces.load(tmp_path)

    def test_refuses_pickled_objects(self, tmp_path: Path) -> None:
        self.write(tmp_path, y_train=np.array([0, "one", None] * 2, dtype=object))
        with pytest.raises(ValueError, match=r"cannot be read.*allow_pickle=False.*path='.*lfw64"):
            faces.load(tmp_path)

    @pytest.mark.parametrize("kept", [0, 100, 40_000])
    def test_damaged_file(self, tmp_path: Path, kept: int) -> None:
        self.write(tmp_path)
        path = tmp_path / "lfw64.npz"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"lfw64\.npz cannot be read.*write it again"):
            faces.load(tmp_path)

    def test_missing_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "lfw64.npz", x_train=np.zeros(1), y_train=np.zeros(1))
        with pytest.raises(ValueError, match=r"lacks \['x_test', 'y_test'\]"):
            faces.load(tmp_path)

    def test_grey_images(self, tmp_path: Path) -> None:
        self.write(tmp_path, x_train=np.zeros((6, 64, 64), np.uint8))
        with pytest.raises(ValueError, match="not a batch of RGB images"):
            faces.load(tmp_path)

    def test_refuses_size(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Received: size='64'"):
            faces.load(tmp_path, size="64")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module", [base, faces, gtsrb, synthetic], ids=lambda module: module.__name__
)
def test_examples_run(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


def test_exports() -> None:
    sources = ["faces", "gtsrb", "scans", "signals", "synthetic"]
    assert datasets.__all__ == ["ImageDataset", "SignalDataset", *sources]
    assert all(hasattr(datasets, name) for name in datasets.__all__)


def real_data(name: str) -> Path:
    folder = os.environ.get("KERAS_TL_DEFENSE_DATA")
    if folder is None:
        pytest.skip("KERAS_TL_DEFENSE_DATA is not set to a folder of real images")
    if not (Path(folder) / name).is_file():
        pytest.skip(f"KERAS_TL_DEFENSE_DATA={folder} holds no {name}")
    return Path(folder)


class TestRealData:
    def test_gtsrb(self) -> None:
        dataset = gtsrb.load(real_data("gtsrb32.npz"))
        assert dataset.classes == 43
        assert dataset.x_train.shape == (13059, 32, 32, 3)
        assert dataset.x_test.shape == (2580, 32, 32, 3)
        assert set(np.bincount(dataset.y_test)) == {60}
        assert dataset.track_train is not None
        assert np.bincount(dataset.track_train).max() == 10
        pairs = np.unique(np.stack([dataset.y_train, dataset.track_train]), axis=1)
        assert pairs.shape[1] == len(np.unique(dataset.track_train)) == 1306

    def test_gtsrb_fewer_frames(self) -> None:
        dataset = gtsrb.load(real_data("gtsrb32.npz"), frames_per_track=2)
        assert len(dataset.x_train) == 2 * 1306

    def test_faces(self) -> None:
        dataset = faces.load(real_data("lfw64.npz"), size=32)
        assert dataset.classes == 65
        assert dataset.x_train.shape == (1477, 32, 32, 3)
        assert dataset.x_test.shape == (496, 32, 32, 3)
        counts = np.bincount(dataset.y_train)
        assert counts.min() >= 14
        assert counts.max() <= 30
