"""trees.py and images.py: image trees, what they leave out, and files that cannot be read."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

import preprocess
from data_sets import FOR_TREES, batches, same, truncate
from preprocess import DataError, load
from sasa.data.augment import AugmentConfig
from sasa.data.decode import readable_formats
from sasa.data.images import Evaluated, Key, resize_tensor
from sasa.data.trees import read_trees


def test_folder_of_jpegs(tree):
    info, train, held, test = load(dataset="folder", data_dir=tree, img_size=16, holdout=2, seed=1)
    assert (info.name, info.num_classes, info.class_names) == ("FOLDER", 2, ("cat", "dog"))
    assert (info.image_size, info.train_size, info.holdout_size, info.test_size) == (16, 20, 2, 14)
    assert load(dataset="FOLDER", data_dir=tree)[0].image_size == 224
    epoch = batches(train, batch_size=6, augment=AugmentConfig(flip=True))
    assert [x.shape for x, _ in epoch] == [(6, 3, 16, 16)] * 3 and epoch[0][0].dtype == torch.float32
    assert all(x.is_contiguous() for x, _ in epoch)
    # evaluation by hand: shorter side to 18 (16 * 256 / 224), centre 16 x 16, normalised
    images, labels = (torch.cat(field) for field in zip(*test.eval_batches(4), strict=True))
    assert labels.tolist() == [0] * 7 + [1] * 7 and next(iter(test.eval_batches(4)))[0].is_contiguous()
    with Image.open(tree / "val" / "cat" / "05.jpg") as file:
        pixels = v2.functional.pil_to_tensor(file.convert("RGB"))
    by_hand = v2.functional.center_crop(v2.functional.resize(pixels, 18, antialias=True), [16, 16]).float() / 255
    by_hand = (by_hand - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[:, None, None]
    torch.testing.assert_close(images[5], by_hand, atol=1e-5, rtol=1e-5)
    held_images = torch.cat([x for x, _ in held.eval_batches(8)])
    assert len(held_images) == 2


def test_a_trees_sample_is_drawn_by_seed_epoch_and_place(tree):
    for path in tree.glob("train/*/*.jpg"):  # one image everywhere: what differs is the draw
        if path.name != "00.jpg":
            shutil.copy(tree / "train" / "cat" / "00.jpg", path)
    train = load(dataset="FOLDER", data_dir=tree, img_size=16)[1]

    def images(config=None, **options):
        return torch.cat([x for x, _ in batches(train, batch_size=22, augment=config, **options)])

    plain = images()
    assert torch.equal(plain, images())
    for other in (plain.roll(1, 0), images(epoch=1), images(seed=6)):
        assert sum(map(torch.equal, plain, other)) < 4
    flipped = images(AugmentConfig(flip=True))
    mirrored = sum(map(torch.equal, plain.flip(-1), flipped))
    assert 4 < mirrored < 18 and mirrored + sum(map(torch.equal, plain, flipped)) == 22
    rand = images(AugmentConfig(auto_augment="rand"))
    assert sum(map(torch.equal, plain, rand)) < 6
    for other in ({"rand_rounds": 6}, {"rand_magnitude": 25}):
        assert sum(map(torch.equal, rand, images(AugmentConfig(auto_augment="rand", **other)))) < 12
    for other in (AugmentConfig(crop_area=0.9), AugmentConfig(crop_aspect=3.0)):  # which reach whoever reads the files
        assert sum(map(torch.equal, plain, images(other))) < 6


def test_trees_are_cut_among_processes_without_a_trace(tree):
    _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16)
    whole = batches(train, epoch=1, batch_size=6, augment=FOR_TREES)
    by_rank = [batches(train, epoch=1, batch_size=3, augment=FOR_TREES, rank=r, world_size=2) for r in (0, 1)]
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*by_rank, strict=True)]
    assert same(joined, whole)
    assert same(batches(train, 1, 2, batch_size=6, augment=FOR_TREES), whole[2:])
    assert not same(batches(train, epoch=2, batch_size=6, augment=FOR_TREES), whole)
    alone = list(test.eval_batches(5))
    for world_size in (2, 3):
        parts = [pair for rank in range(world_size) for pair in test.eval_batches(5, rank, world_size)]
        for left, right in zip(zip(*parts, strict=True), zip(*alone, strict=True), strict=True):
            assert torch.equal(torch.cat(left), torch.cat(right))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_ends_the_run_with_its_name(tree, workers):
    path = truncate(tree / "train" / "dog" / "02.jpg")
    truncate(tree / "val" / "dog" / "02.jpg")
    _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=workers)
    for read in (lambda: batches(train, batch_size=11), lambda: list(test.eval_batches(4))):
        with pytest.raises(DataError, match=r"02\.jpg: .*truncated.*--skip-bad-images") as error:
            read()
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=str(path)):
        batches(train, batch_size=11)
    image, _, bad = train._files[Key(13, np.zeros((10, 4)))]  # nothing more is read to find a substitute
    assert image is None and len(bad) == 1


def test_a_truncated_jpeg_can_be_skipped_and_is_counted(tree):
    options = {"dataset": "FOLDER", "data_dir": tree, "img_size": 16, "skip_bad_images": True}
    images_before = torch.cat([x for x, _ in batches(load(**options)[1], batch_size=11)])
    truncate(tree / "train" / "cat" / "10.jpg")
    truncate(tree / "val" / "cat" / "06.jpg")
    _, train, _, test = load(**options)
    epoch = batches(train, batch_size=11)
    batches(train, epoch=1, batch_size=11)  # met again, counted once
    assert len(train.bad_images) == 1 and "train/cat/10.jpg: " in train.bad_images[0]
    # the next file in the list, a dog, takes its place; every other image is what it was
    assert [len(x) for x, _ in epoch] == [11, 11]
    order = preprocess.epoch_order(22, 5, 0)
    images, labels = (torch.cat(field) for field in zip(*epoch, strict=True))
    assert torch.equal(labels, (order >= 10).long())
    assert torch.equal(images[order != 10], images_before[order != 10])
    # in evaluation nothing takes its place, so nothing counts twice
    assert [len(y) for _, y in test.eval_batches(1)] == [1] * 13 and "val/cat/06.jpg" in test.bad_images[0]


def test_an_empty_class_whose_files_are_left_out_says_so(tree):
    for path in tree.glob("train/dog/*.jpg"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"train/dog: class folder without images.*11 files .* ending \(\.heic\)"):
        read_trees("FOLDER", tree)


def test_a_loose_image_is_left_out_and_not_taken(tree):
    Image.new("RGB", (9, 9)).save(tree / "train" / "loose.gif")
    assert read_trees("FOLDER", tree).notes == [f"{tree / 'train'}: left out: 1 images outside the class folders"]


def test_what_was_skipped_is_counted_anew_in_each_pass(tree):
    """A file that fails in another way each time, more often than there are files, and is whole in the end."""
    path = tree / "val" / "cat" / "06.jpg"
    whole = path.read_bytes()
    for image in tree.glob("val/*/*.jpg"):
        if image.name not in ("05.jpg", "06.jpg"):
            image.unlink()
    _, _, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16, skip_bad_images=True)
    contents = (b"", whole[:25], whole[:-60], whole[:-120], whole[:-180])
    for content in contents:
        path.write_bytes(content)
        assert sum(len(y) for _, y in test.eval_batches(4)) == 3 and test.skipped == 1
    assert len(test.bad_images) >= len(test) == 4
    path.write_bytes(whole)
    assert sum(len(y) for _, y in test.eval_batches(4)) == 4 and test.skipped == 0


def test_nothing_readable_is_an_error_even_when_skipping(tree):
    for path in tree.glob("train/*/*.jpg"):
        path.write_bytes(b"not an image")
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, skip_bad_images=True)
    with pytest.raises(DataError, match="cannot read any of the 22 images"):
        batches(train)


def test_broken_trees_are_named(tree, tmp_path):
    def expect(words, dataset="FOLDER", data_dir=tree):
        with pytest.raises(DataError, match=words) as error:
            load(dataset=dataset, data_dir=data_dir)
        assert "\n" not in str(error.value)

    expect("nowhere: no such folder", data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    expect("empty/train: no such folder", data_dir=tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    expect("empty/train: no class folders", data_dir=tmp_path / "empty")
    for split in ("train", "val"):  # as archives are unpacked: all classes in one folder of train/
        shutil.copytree(tree / split, tmp_path / "nested" / split / "images")
    expect("nested/train/images: the only class folder", data_dir=tmp_path / "nested")
    expect("1000 class folders, here are 2", dataset="IMAGENET")
    (tree / "train" / "bird").mkdir()
    expect("train/bird: class folder without images")
    (tree / "train" / "bird" / "notes.txt").write_text("no image")
    expect("train/bird: class folder without images")
    shutil.copy(tree / "train" / "cat" / "00.jpg", tree / "train" / "bird" / "00.jpg")
    expect("different class folders, bird")
    shutil.rmtree(tree / "train" / "bird")
    shutil.rmtree(tree / "val")
    expect("tree/val: no such folder")


def test_imagenet_has_a_thousand_classes(tree, tmp_path):
    for split in ("train", "val"):
        for i in range(1000):
            folder = tmp_path / "imagenet" / split / f"n{i:08}"
            folder.mkdir(parents=True)
            (folder / "0.jpg").hardlink_to(tree / "train" / "cat" / "00.jpg")
    info, train, _, _ = load(dataset="ImageNet", data_dir=tmp_path / "imagenet")
    assert (info.name, info.num_classes, len(train), info.image_size) == ("IMAGENET", 1000, 1000, 224)


def test_trees_refuse_what_the_resized_crop_replaces(tree):
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16)
    with pytest.raises(ValueError, match="pad, rotate, translate and zoom"):
        train.batches(0, batch_size=4, augment=AugmentConfig(pad=4))


def listed(tree) -> list[str]:
    files, labels = read_trees("FOLDER", tree).train
    return [f"{label} {os.path.relpath(files.name(i), tree / 'train')}" for i, label in enumerate(labels)]


def test_files_are_listed_as_torchvision_lists_them(tree):
    for name in ("sub/deep", "sub-x", "sub", "a.b"):
        (tree / "train" / "cat" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / "train" / "cat" / "00.jpg", tree / "train" / "cat" / name / "Z.JPEG")
    (tree / "elsewhere").mkdir()
    shutil.copy(tree / "train" / "cat" / "00.jpg", tree / "elsewhere" / "linked.png")
    (tree / "train" / "dog" / "link").symlink_to(tree / "elsewhere")
    (tree / "train" / "dog" / "file.jpg").symlink_to(tree / "train" / "dog" / "01.jpg")
    theirs = datasets.ImageFolder(str(tree / "train"))
    files, labels = read_trees("FOLDER", tree).train
    assert [(files.name(i), label) for i, label in enumerate(labels)] == theirs.samples and len(labels) == 28


def test_each_real_folder_is_listed_once_and_under_its_own_class(tree):
    before = listed(tree)
    (tree / "train" / "cat" / "up").symlink_to("..")
    (tree / "train" / "cat" / "loop").symlink_to(".")
    (tree / "train" / "cat" / "root").symlink_to(tree)
    (tree / "train" / "dog" / "sub").mkdir()
    shutil.copy(tree / "train" / "dog" / "00.jpg", tree / "train" / "dog" / "sub" / "x.jpg")
    (tree / "train" / "cat" / "aside").symlink_to(tree / "train" / "dog" / "sub")
    found = listed(tree)
    assert found == sorted([*before, "1 dog/sub/x.jpg"])
    assert read_trees("FOLDER", tree).notes == [
        f"{tree / 'train'}: left out: 4 links to a folder that is listed already"
    ]


def test_what_is_left_out_is_counted_in_one_line(tree, capsys):
    before = listed(tree)
    train = tree / "train"
    for split in (train, tree / "val"):
        shutil.copytree(split / "cat", split / ".ipynb_checkpoints")
        (split / "gone").symlink_to("/nonexistent")
    shutil.copytree(train / "cat", train / "cat" / "@eaDir")
    (train / "cat" / "._00.jpg").write_bytes(b"resource fork")
    (train / "dog" / "dangling.jpg").symlink_to("/nonexistent.jpg")
    for name in ("notes.txt", "more.txt", "a.csv", "none"):
        (train / "dog" / name).write_text("no image")
    shutil.copy(train / "cat" / "00.jpg", train / "outside.jpg")
    os.mkfifo(train / "dog" / "pipe.png")
    load(dataset="FOLDER", data_dir=tree, img_size=16)
    assert capsys.readouterr().out.splitlines() == [
        f"{train}: left out: 4 files without an image's ending (.txt .csv none), 3 hidden files and service folders, "
        "1 images outside the class folders, 2 links that lead nowhere, 1 pipes, devices and sockets",
        f"{tree / 'val'}: left out: 1 hidden files and service folders, 1 links that lead nowhere",
    ]
    assert listed(tree) == before
    said = []
    load(dataset="FOLDER", data_dir=tree, img_size=16, report=said.append)
    assert len(said) == 2 and not capsys.readouterr().out


def test_validation_images_that_are_those_of_training_are_mentioned(tree):
    shutil.rmtree(tree / "val")
    (tree / "val").symlink_to(tree / "train")
    assert ["are of images that were trained on" in note for note in read_trees("FOLDER", tree).notes] == [True]


@pytest.mark.parametrize(("largest", "is_said"), [(4095, True), (8191, True), (8192, False), (65535, False)])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_images_that_would_be_nearly_black_are_mentioned(tmp_path, largest, is_said, ending):
    """As cameras of 12 bits write them: the high byte keeps 16 levels of gray."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for i in range(5):
            pixels = np.full((9, 9), largest, np.uint16)
            Image.fromarray(pixels).save(folder / f"{i}.{ending}")
        (folder / f"5.{ending}").write_bytes(b"damaged")
    said = []
    load(dataset="FOLDER", data_dir=tmp_path, img_size=16, report=said.append)
    assert [f"no pixel above {largest} of 65535" in line for line in said] == [True] * is_said


def test_endings_of_other_cameras_and_editors_are_listed(tree):
    for i, ending in enumerate((".gif", ".JFIF", ".avif")):
        (tree / "train" / "cat" / f"0{i}.jpg").rename(tree / "train" / "cat" / f"0{i}{ending}")
    assert len(listed(tree)) == (22 if "AVIF" in readable_formats() else 21)
    endings = "3 files (.avif .gif .jfif)" if "AVIF" in readable_formats() else "2 files (.gif .jfif)"
    assert read_trees("FOLDER", tree).notes[0].endswith(f"taken, as ImageFolder does not: {endings}")
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16)
    assert len(batches(train, batch_size=11)) == len(train) // 11


def test_names_of_any_bytes(tree):
    """File and class names with a line break, U+2028, bytes that are not UTF-8, and two spaces."""
    for split in ("train", "val"):
        (tree / split / "cat").rename(tree / split / os.fsdecode(b"caf\xe9\n\xe2\x80\xa8  x"))
    path = os.fsencode(tree / "train" / "dog") + b"/a\n\xff  b.png"
    with open(path, "wb") as file:
        file.write(b"no image")
    info, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16)
    assert info.class_names == (os.fsdecode(b"caf\xe9\n\xe2\x80\xa8  x"), "dog")
    assert sum(len(labels) for _, labels in test.eval_batches(8)) == 14
    with pytest.raises(DataError, match=r"a\\x0a\\xff  b\.png: no image of a kind") as error:
        batches(train, batch_size=11)
    assert "\n" not in str(error.value)


def test_class_folders_that_look_alike_are_told_apart(tree):
    shutil.copytree(tree / "train" / "cat", tree / "train" / "caf\xe9")
    shutil.copytree(tree / "train" / "cat", tree / "val" / "cafe\u0301")
    with pytest.raises(DataError, match=r"'cafe\\u0301' is in one of them only"):
        load(dataset="FOLDER", data_dir=tree)


def test_one_image_is_the_one_of_evaluation(tree):
    for data in (load(dataset="FOLDER", data_dir=tree, img_size=16)[3], load(dataset="DIGITS")[3]):
        images, labels = (torch.cat(field) for field in zip(*data.eval_batches(5), strict=True))
        for index in (0, 9):
            image, label = data.image(index)
            assert torch.equal(image, images[index]) and label == labels[index]
    truncate(tree / "val" / "cat" / "05.jpg")
    with pytest.raises(DataError, match=r"05\.jpg: .*truncated"):
        load(dataset="FOLDER", data_dir=tree, img_size=16, skip_bad_images=True)[3].image(5)


def test_evaluation_at_another_size(tree):
    options = {"img_size": 16, "eval_size": 24, "eval_crop": 0.75, "eval_interpolation": "bicubic", "holdout": 4}
    for name in ("FOLDER", "DIGITS"):
        info, train, held, test = load(dataset=name, data_dir=tree, **options)
        assert (info.image_size, info.eval_size) == (16, 24)
        assert next(train.batches(0, batch_size=4))[0].shape == (4, 3, 16, 16)
        for split in (held, test):
            assert next(split.eval_batches(4))[0].shape == (4, 3, 24, 24)
    info, _, _, test = load(dataset="DIGITS", **options)
    original = load(dataset="DIGITS")[3].images
    assert torch.equal(test.images, resize_tensor(original, Evaluated(24, 32, "bicubic")))
    sizes = range(8, 4097)
    assert [round(size / (224 / 256)) for size in sizes] == [round(size * 256 / 224) for size in sizes]
