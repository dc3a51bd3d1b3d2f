"""Grids made elsewhere: the layout of each format by hand-made files, orientation, padding, damaged and hostile files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shapediff.data.binvox import read_binvox
from shapediff.data.dataset import ShapeDataset
from shapediff.data.grid_files import open_grid_file
from shapediff.data.importing import centred_cube, import_voxels, upright
from shapediff.data.manifest import split_of
from shapediff.errors import ConfigError, DataError
from shapediff.grid.morton import morton_to_dense


def stored_grids(folder: Path) -> np.ndarray:
    dataset = ShapeDataset(folder)
    return morton_to_dense(dataset.batch(np.arange(len(dataset)))["voxels"].numpy()) > 0


def random_grids(num: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((num, side, side, side)) < 0.3


def report(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


# A 2 x 2 x 2 binvox by hand. File order: x slowest, then z, then y fastest; inside are (x, y, z) = (0, 1, 0), (1, 0, 1).
BINVOX_HEADER = b"#binvox 1\ndim 2 2 2\ntranslate -0.5 -0.5 -0.5\nscale 1\ndata\n"
BINVOX_RUNS = bytes([0, 1, 1, 1, 0, 4, 1, 1, 0, 1])


def test_binvox_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.binvox"
    path.write_bytes(BINVOX_HEADER + BINVOX_RUNS)
    expected = np.zeros((2, 2, 2), dtype=bool)
    expected[0, 1, 0] = expected[1, 0, 1] = True
    np.testing.assert_array_equal(read_binvox(path), expected)


def test_binvox_of_unequal_sides(tmp_path: Path) -> None:
    path = tmp_path / "a.binvox"
    grid = np.random.default_rng(0).random((3, 5, 4)) < 0.5  # (x, y, z)
    voxels = grid.transpose(0, 2, 1).ravel()
    runs = b"".join(bytes([int(value), 1]) for value in voxels)
    path.write_bytes(BINVOX_HEADER.replace(b"2 2 2", b"3 4 5") + runs)  # dim is depth, height, width: x, z, y
    np.testing.assert_array_equal(read_binvox(path), grid)
    assert open_grid_file(path).shape == (3, 5, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "binvox file"),
        (b"#binvox 2\n", "binvox file"),
        (BINVOX_HEADER[:20], "unknown line"),
        (BINVOX_HEADER.replace(b"dim 2 2 2\n", b""), "no 'dim'"),
        (BINVOX_HEADER.replace(b"2 2 2", b"2 2"), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b"2 2 0"), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b"2 2 -2"), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b"2 2 9999999999999"), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b"0000000019999 2 2"), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b" ".join([b"000000001" + b"9" * 10] * 3)), "three sizes"),
        (BINVOX_HEADER.replace(b"2 2 2", b"2 2 1025"), "three sizes"),
        (BINVOX_HEADER.replace(b"scale", b"scales"), "unknown line"),
        (b"#binvox 1\n" + b"scale 1\n" * 100, "no 'data' line"),
        (BINVOX_HEADER + BINVOX_RUNS[:-2], "cut off"),
        (BINVOX_HEADER + BINVOX_RUNS + b"\0\1", "9 voxels of 8"),
        (BINVOX_HEADER + BINVOX_RUNS[:-1], "even number"),
        (BINVOX_HEADER + b"\1\0" * 5000, "bytes"),
        (BINVOX_HEADER + b"\2\10", "value 2"),
    ],
)
def test_bad_binvox_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.binvox"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_binvox(path)


def test_upright_turns_z_up_to_y_up_with_the_front_at_plus_z() -> None:
    grid = np.zeros((4, 4, 4), dtype=bool)
    grid[1, 0, 3] = True  # top, in front: -y is the front of a z-up model
    np.testing.assert_array_equal(np.argwhere(upright(grid, up="z")), [[1, 3, 3]])
    np.testing.assert_array_equal(upright(grid, up="y"), grid)


def test_a_turn_takes_the_front_to_the_right() -> None:
    grid = np.zeros((4, 4, 4), dtype=bool)
    grid[:, :, 3] = True
    assert upright(grid, up="y", turns=1)[3].all()


def test_padding_centres() -> None:
    cube = centred_cube(np.ones((3, 2, 4), dtype=bool), 4)
    assert cube.sum() == 24 and cube[0:3, 1:3, :].all()


def test_packed_bits_are_of_the_flattened_grid(tmp_path: Path) -> None:
    grids = random_grids(3)
    np.savez(tmp_path / "chair.npz", packed=np.packbits(grids.reshape(3, -1), axis=1), resolution=np.array(8))
    summary = import_voxels(tmp_path / "chair.npz", tmp_path / "out")
    assert summary.num_per_class == {"chair": 3} and summary.num_ok == 3
    np.testing.assert_array_equal(stored_grids(tmp_path / "out"), grids)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_dense_arrays(tmp_path: Path, dtype: type, suffix: str) -> None:
    grids = random_grids(2)
    array = grids.astype(dtype)[:, None] * dtype(1)
    if suffix == "npz":
        np.savez_compressed(tmp_path / "a.npz", voxels=array, names=np.array(["x", "y"]))
    else:
        np.save(tmp_path / "a.npy", np.asfortranarray(array))
    import_voxels(tmp_path / f"a.{suffix}", tmp_path / "out")
    np.testing.assert_array_equal(stored_grids(tmp_path / "out"), grids)


def test_classes_come_from_folders_file_names_and_the_root(tmp_path: Path) -> None:
    root = tmp_path / "things"
    (root / "lamp" / "deep").mkdir(parents=True)
    np.save(root / "lamp" / "deep" / "a.npy", random_grids(1)[0])
    np.save(root / "lamp" / "many.npy", random_grids(2))
    np.save(root / "sofa.npy", random_grids(3))
    np.save(root / "single.npy", random_grids(1)[0])
    summary = import_voxels(root, tmp_path / "out")
    assert summary.num_per_class == {"lamp": 3, "sofa": 3, "things": 1}
    ids = [shape.id for shape in ShapeDataset(tmp_path / "out").shapes]
    assert ids[:3] == ["lamp/deep/a.npy", "lamp/many.npy#00000", "lamp/many.npy#00001"]


def test_turns_are_by_class(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    grids = random_grids(1)
    for name in ("a", "b"):
        np.save(root / f"{name}.npy", grids)
    import_voxels(root, tmp_path / "out", up="z", turns={"b": 3})
    plain, turned = stored_grids(tmp_path / "out")
    np.testing.assert_array_equal(turned, np.rot90(plain, 3, axes=(2, 0)))
    with pytest.raises(ConfigError, match="turns names c; the classes are a, b"):
        import_voxels(root, tmp_path / "out", turns={"c": 1})


def test_resolutions_must_agree_or_be_chosen(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    np.save(root / "a.npy", np.ones((5, 4, 3), dtype=bool))
    np.save(root / "b.npy", np.ones((9, 4, 3), dtype=bool))
    with pytest.raises(DataError, match=r"1 of 8\^3, 1 of 16\^3.*--resolution"):
        import_voxels(root, tmp_path / "out")
    summary = import_voxels(root, tmp_path / "out", resolution=8)
    assert (summary.num_ok, summary.num_skipped) == (1, 1)
    assert "9 x 4 x 3 need a cube of 16^3, not 8^3" in report(tmp_path / "out")[1]["reason"]
    assert stored_grids(tmp_path / "out")[0].sum() == 60


def test_equal_grids_share_a_split(tmp_path: Path) -> None:
    grids = random_grids(2)
    np.save(tmp_path / "a.npy", grids[np.arange(80) % 2])
    import_voxels(tmp_path / "a.npy", tmp_path / "out")
    shapes = ShapeDataset(tmp_path / "out").shapes
    assert {shape.split for shape in shapes[::2]} == {split_of("a.npy#00000")}
    assert {shape.split for shape in shapes[1::2]} == {split_of("a.npy#00001")}


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_zip(path: Path, member: bytes, name: str = "voxels.npy") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, member)


def test_bad_files_are_skipped_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    whole = npy_bytes(random_grids(2))
    (root / "a_good.npy").write_bytes(whole)
    (root / "b_cut.npy").write_bytes(whole[:-1])
    (root / "c_text.npy").write_bytes(b"not a grid")
    (root / "d_objects.npy").write_bytes(npy_bytes(np.array([[[{}]]], dtype=object)))
    (root / "e_flat.npy").write_bytes(npy_bytes(np.ones((4, 4))))
    (root / "f_none.npy").write_bytes(npy_bytes(np.ones((0, 4, 4, 4))))
    (root / "g_long.npy").write_bytes(npy_bytes(np.ones((2000, 1, 1), dtype=bool)))
    (root / "h_huge.npy").write_bytes(whole.replace(b"(2, 8, 8, 8), }      ", b"(2, 8, 8, 8000000), }"))
    (root / "i_text.npz").write_bytes(b"not a zip")
    write_zip(root / "j_cut.npz", whole[:-1])
    write_zip(root / "k_nothing.npz", whole, name="readme.txt")
    np.savez(root / "l_two.npz", a=random_grids(1), b=random_grids(1))
    np.savez(root / "m_packed.npz", packed=np.zeros((2, 5), dtype=np.uint8))
    np.save(root / "n_nan.npy", np.full((8, 8, 8), np.nan))
    np.save(root / "o_empty.npy", np.zeros((8, 8, 8)))
    content = bytearray((root / "l_two.npz").read_bytes())
    content[200:240] = bytes(40)
    (root / "p_crc.npz").write_bytes(bytes(content).replace(b"b.npy", b"b.txt"))
    summary = import_voxels(root, tmp_path / "out")
    assert (summary.num_ok, summary.num_skipped) == (2, 15)
    reasons = {line["source"]: line["reason"] for line in report(tmp_path / "out") if line["status"] == "skipped"}
    for name, part in {
        "b_cut.npy": "cut off",
        "c_text.npy": "cannot be read",
        "d_objects.npy": "use bool, integers or floats",
        "e_flat.npy": "shape (4, 4)",
        "f_none.npy": "no grid",
        "g_long.npy": "2000 x 1 x 1",
        "h_huge.npy": "declares (2, 8, 8, 8000000) of bool, its size is",
        "i_text.npz": "cannot be read",
        "j_cut.npz": "cut off",
        "k_nothing.npz": "it has none",
        "l_two.npz": "a (1, 8, 8, 8), b (1, 8, 8, 8)",
        "m_packed.npz": "R^3 / 8",
        "n_nan.npy": "NaN",
        "o_empty.npy": "empty",
        "p_crc.npz": "",
    }.items():
        assert part in reasons[name], (name, reasons[name])


def test_nothing_to_import_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="nothing to read"):
        import_voxels(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read"):
        import_voxels(tmp_path / "in", tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"not one of \.npz"):
        import_voxels(tmp_path / "a.txt", tmp_path / "out")


def test_key_chooses_the_array(tmp_path: Path) -> None:
    grids = random_grids(2)
    np.savez(tmp_path / "a.npz", one=grids[:1], two=grids[1:])
    import_voxels(tmp_path / "a.npz", tmp_path / "out", key="two")
    np.testing.assert_array_equal(stored_grids(tmp_path / "out"), grids[1:])


def test_threshold_parts_floats(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 4, 4))
    np.save(tmp_path / "a.npy", values)
    import_voxels(tmp_path / "a.npy", tmp_path / "out", threshold=0.8)
    np.testing.assert_array_equal(stored_grids(tmp_path / "out")[0], values > 0.8)
