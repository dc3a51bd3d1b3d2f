"""Which meshes are found, under which class and split: folders, archives, tables, and names that lead astray."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import trimesh

from shapediff.data import archives
from shapediff.data.archives import open_archive, readable_archive
from shapediff.data.sources import Source, caption_of, find_meshes
from shapediff.errors import DataError
from shapediff.geometry.mesh import READABLE_SUFFIXES

BOX = trimesh.creation.box().export(file_type="obj").encode()


def place(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(BOX)
    return root


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A .zip, .tar or .tar.gz with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return path
    mode = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}[path.suffix]
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def facts(sources: list[Source]) -> list[tuple[str, str, str | None]]:
    return [(source.name, source.class_name, source.split) for source in sources]


def test_modelnet_keeps_its_split(tmp_path: Path) -> None:
    root = place(tmp_path, "chair/train/chair_0001.off", "chair/test/chair_0890.off", "night_stand/train/n_1.off")
    assert facts(find_meshes(root)) == [
        ("chair/test/chair_0890.off", "chair", "test"),
        ("chair/train/chair_0001.off", "chair", "train"),
        ("night_stand/train/n_1.off", "night_stand", "train"),
    ]


def test_shapenet_ids_become_names(tmp_path: Path) -> None:
    model = "a1b2/models/model_normalized.obj"
    root = place(tmp_path / "ShapeNetCore.v2", f"03001627/{model}", f"02691156/{model}", f"12345678/{model}")
    (root / "taxonomy.json").write_text("[]")
    assert [source.class_name for source in find_meshes(root)] == ["12345678", "airplane", "chair"]
    assert facts(find_meshes(root / "03001627")) == [(model, "chair", None)]


def test_split_folders_need_all_files_in_them(tmp_path: Path) -> None:
    root = place(tmp_path, "train/chair/a.obj", "validation/chair/b.obj", "test/sofa/c.obj")
    assert [(s.class_name, s.split) for s in find_meshes(root)] == [
        ("chair", "train"),
        ("chair", "val"),
        ("sofa", "test"),
    ]
    place(root, "lamp/d.obj")
    assert {s.class_name for s in find_meshes(root)} == {"train", "validation", "test", "lamp"}


@pytest.mark.parametrize(
    "name", ["ModelNet10.zip", "ModelNet10.tar", "ModelNet10.tar.gz", "ModelNet10.tgz", "x.tar.xz", "x.tar.bz2"]
)
def test_archives_read_as_the_folder_that_they_hold(tmp_path: Path, name: str) -> None:
    top = "ModelNet10" if name.startswith("M") else "x"
    members = {
        f"{top}/chair/train/a.off": BOX,
        f"{top}/bed/test/b.off": BOX[:-5],
        f"__MACOSX/{top}/chair/train/._a.off": b"junk",
    }
    archive = pack(
        tmp_path / name, {**members, f"{top}/README.txt": b"read me", f"{top}/chair/train/a.txt": b"a red chair\n"}
    )
    found = find_meshes(archive, cache=tmp_path / "cache")
    assert [(s.class_name, s.split) for s in found] == [("bed", "test"), ("chair", "train")]
    assert [open_archive(s.path).read(s.member, 10**6) for s in found] == [BOX[:-5], BOX]
    assert [caption_of(s) for s in found] == [None, "a red chair"]
    assert {s.suffix for s in found} == {".off"}


def test_archives_in_a_folder_are_folders(tmp_path: Path) -> None:
    """ShapeNet comes as an archive a synset; others as an archive a class."""
    model = "a1b2/models/model_normalized.obj"
    pack(tmp_path / "in" / "03001627.zip", {f"03001627/{model}": BOX})
    pack(tmp_path / "in" / "sofa.tar", {"a.obj": BOX})
    place(tmp_path / "in", "bed/b.obj")
    found = find_meshes(tmp_path / "in", cache=tmp_path / "cache")
    assert facts(found) == [
        ("bed/b.obj", "bed", None),
        (f"03001627.zip/03001627/{model}", "chair", None),
        ("sofa.tar/a.obj", "sofa", None),
    ]


@pytest.mark.parametrize(
    "name", ["../evil.obj", "/etc/evil.obj", "chair/../../evil.obj", "..\\evil.obj", "C:/evil.obj"]
)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_names_that_lead_out_are_reported_not_read(tmp_path: Path, name: str, kind: str) -> None:
    archive = pack(tmp_path / "in" / kind, {"chair/good.obj": BOX, name: BOX})
    problems = {s.member: s.problem for s in find_meshes(archive, cache=tmp_path / "cache")}
    assert problems["chair/good.obj"] == "" and "leads out" in problems[name]
    assert not list(tmp_path.rglob("evil.obj"))


def test_links_in_a_tar_are_reported_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE):
            info = tarfile.TarInfo(f"chair/{kind.decode()}.obj")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    found = find_meshes(tmp_path / "a.tar", cache=tmp_path / "cache")
    assert len(found) == 5 and all(s.problem == "is a link, a device or sparse" for s in found)


def test_of_a_member_no_more_is_read_than_the_limit_allows(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"chair/a.obj": b" " * 5_000_000})
    assert len(open_archive(archive).read("chair/a.obj", 1000)) == 1001


@pytest.mark.parametrize("said", [10, 500, 0xFFFFFFF0])
def test_a_member_that_lies_about_its_size_costs_no_more_than_the_limit(tmp_path: Path, said: int) -> None:
    path = pack(tmp_path / "a.zip", {"chair/a.obj": b" " * 50_000_000})
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02")  # in the central directory, from which the size is taken
    assert int.from_bytes(whole[entry + 24 : entry + 28], "little") == 50_000_000
    whole[entry + 24 : entry + 28] = said.to_bytes(4, "little")
    path.write_bytes(whole)
    archive = open_archive(path)
    tracemalloc.start()
    if said <= 1000:  # it ends early, and then its sum is not that of what was read
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            archive.read("chair/a.obj", 1000)
    else:
        assert len(archive.read("chair/a.obj", 1000)) == 1001
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20, "neither what it holds nor what it says, 50 MB and 4 GB"


def test_a_compressed_tar_that_is_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED", 1 << 20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    with pytest.raises(DataError, match="far beyond its size"):
        readable_archive(tmp_path / "a.tar.gz", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_a_damaged_archive_is_one_clear_error(tmp_path: Path, name: str) -> None:
    whole = pack(tmp_path / name, {f"chair/{i}.obj": os.urandom(20_000) for i in range(20)}).read_bytes()
    for content in (b"", b"no archive at all" * 100, whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"a\.\S+: .*(damaged|cannot be read)|nothing to read in \S+a\."):
            find_meshes(tmp_path / name, cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tar.bz2", "b.tar.xz", "b.zip"])
def test_a_flipped_byte_costs_one_archive(tmp_path: Path, name: str) -> None:
    """Wherever it lies: each reader has errors of its own, deflate's are not even OSErrors."""
    root = place(tmp_path / "in", "chair/a.obj")
    whole = pack(root / name, {f"{i}.obj": os.urandom(300) + BOX for i in range(5)}).read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        (root / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        found = find_meshes(root, cache=tmp_path / "cache")
        assert "chair/a.obj" in {source.name for source in found if not source.problem}


def test_archives_that_the_system_refuses_cost_themselves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place(tmp_path / "in", "chair/a.obj")
    for name in ("gone.tar.gz", "gone.zip"):
        (root / name).symlink_to(tmp_path / "nowhere")
    pack(root / "closed.tgz", {"b.obj": BOX})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setitem(archives._COMPRESSED_TARS, ".tgz", refuse)  # for root, to whom every file is open
    problems = {source.name: source.problem for source in find_meshes(root, cache=tmp_path / "cache")}
    assert problems.pop("chair/a.obj") == ""
    assert problems == {
        "gone.tar.gz": f"cannot be read: [Errno 2] No such file or directory: '{root}/gone.tar.gz'",
        "gone.zip": f"cannot be read: [Errno 2] No such file or directory: '{root}/gone.zip'",
        "closed.tgz": f"cannot be read: [Errno 13] Permission denied: '{root}/closed.tgz'",
    }


def test_a_damaged_caption_costs_the_caption_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("chair/a.obj", BOX)
        archive.writestr("chair/a.txt", b"a red chair")
    path.write_bytes(path.read_bytes().replace(b"a red chair", b"a bad chair"))  # the sum of the old text stays
    (source,) = find_meshes(path, cache=tmp_path / "cache")
    assert caption_of(source) is None
    assert "no caption for 'chair/a.obj'" in caplog.text and "CRC" in caplog.text


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", {"chair/a.obj": BOX})
    assert len(find_meshes(path, cache=tmp_path / "cache")) == 1
    pack(path, {"chair/a.obj": BOX, "chair/b.obj": BOX})
    assert len(find_meshes(path, cache=tmp_path / "cache")) == 2


def test_a_table_lists_paths_classes_splits_and_captions(tmp_path: Path) -> None:
    place(tmp_path, "x/1.obj", "ünïcode/椅子.obj")
    table = tmp_path / "meshes.csv"
    table.write_text(
        "caption,path,class,split\na chair,x/1.obj,chair,test\n,ünïcode/椅子.obj,chair,\n,gone.obj,sofa,train\n"
        ",x/1.fbx,sofa,\n,x/2.obj,,\n,x/3.obj,sofa,dev\n",
        encoding="utf-8-sig",
    )
    found = {source.name: source for source in find_meshes(table)}
    assert facts([found["x/1.obj"], found["ünïcode/椅子.obj"]]) == [
        ("x/1.obj", "chair", "test"),
        ("ünïcode/椅子.obj", "chair", None),
    ]
    assert caption_of(found["x/1.obj"]) == "a chair" and not found["x/1.obj"].problem
    assert found["gone.obj"].problem == "is not there"
    assert "cannot be read" in found["x/1.fbx"].problem
    assert "lacks its path or class" in found["x/2.obj"].problem
    assert "split 'dev'" in found["x/3.obj"].problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs path and class"),
        ("", "needs path and class"),
        ("path,class\n", "lists no mesh"),
        ("path,class\na.obj,c\na.obj,d\n", "twice"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        find_meshes(tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["data.zip", "data.tar", "folder"])
def test_all_of_modelnet_or_shapenet_in_one_folder_more(tmp_path: Path, kind: str) -> None:
    """As they come out of an archive that was given another name, or unpacked into a folder of downloads."""
    layouts = {
        "ModelNet10": {"chair/train/a.off": ("chair", "train"), "bed/test/b.off": ("bed", "test")},
        "ShapeNetCore.v2": {
            "03001627/ab/models/model_normalized.obj": ("chair", None),
            "02691156/cd/models/model_normalized.obj": ("airplane", None),
        },
    }
    for top, layout in layouts.items():
        names = [f"{top}/{name}" for name in layout]
        root = tmp_path / top
        meshes = place(root, *names) if kind == "folder" else pack(root / kind, dict.fromkeys(names, BOX))
        assert {(s.class_name, s.split) for s in find_meshes(meshes, cache=tmp_path / "cache")} == set(layout.values())
    one_class = place(tmp_path / "x", "chair/train/a/m.obj", "chair/test/b/m.obj")
    assert {s.class_name for s in find_meshes(one_class)} == {"chair"}


def test_classes_one_folder_too_deep_are_hinted_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = place(tmp_path / "in", *(f"stuff/{name}/{i}.obj" for name in ("chair", "bed") for i in range(4)))
    assert {source.class_name for source in find_meshes(root)} == {"stuff"}
    assert "all 8 meshes are of one class, 'stuff'; if the 2 folders in it are the classes" in caplog.text
    caplog.clear()
    assert {source.class_name for source in find_meshes(root / "stuff")} == {"chair", "bed"}
    find_meshes(place(tmp_path / "models", *(f"chair/{i}/m.obj" for i in range(4))))
    assert not caplog.text


def test_what_cannot_be_read_is_said_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = place(
        tmp_path / "in",
        "chair/a.obj",
        "chair/a.fbx",
        "chair/b.FBX",
        "chair/closed/c.obj",
        "chair/notes.txt",
        "bed/e.obj",
    )
    (root / "bed" / "broken.zip").write_bytes(b"PK\3\4 nothing more")
    pack(root / "bed" / "more.zip", {"f.step": BOX, "g.off": BOX})
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # for root, to whom every folder is open
    problems = {source.name: source.problem for source in find_meshes(root, cache=tmp_path / "cache")}
    readable = ", ".join(READABLE_SUFFIXES)
    assert problems == {
        "chair/a.obj": "",
        "bed/e.obj": "",
        "bed/more.zip/g.off": "",
        "chair/b.FBX": f".fbx cannot be read; convert it to one of {readable}",
        "bed/more.zip/f.step": f".step cannot be read; convert it to one of {readable}",
        "chair/closed": "the folder cannot be entered: Permission denied",
        "bed/broken.zip": "cannot be read: File is not a zip file",
    }
    limited = [source.name for source in find_meshes(root, limit=1, cache=tmp_path / "cache") if not source.problem]
    assert limited == ["bed/e.obj", "chair/a.obj"]


def test_a_link_takes_no_name_from_the_folder_that_it_leads_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = place(tmp_path / "in", "chair/a.obj", "seat/b.obj")
    place(tmp_path / "elsewhere", "c.obj")
    (root / "alias").symlink_to(root / "chair", target_is_directory=True)
    (root / "chair" / "up").symlink_to(root, target_is_directory=True)
    (root / "sofa").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [source.name for source in find_meshes(root)] == ["chair/a.obj", "seat/b.obj", "sofa/c.obj"]
    assert all(f"{name}': it is another name of a folder that is read" in caplog.text for name in ("alias", "up"))


def test_members_of_one_name_are_the_last(tmp_path: Path) -> None:
    """`tar -u` appends the new version and leaves the old one in place."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for content in (b"old", BOX):
            info = tarfile.TarInfo("./chair/a.obj")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("./chair/a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"a box"))
    (source,) = find_meshes(path, cache=tmp_path / "cache")
    assert source.class_name == "chair" and caption_of(source) == "a box"
    assert open_archive(source.path).read(source.member, 10**6) == BOX


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    place(tmp_path, "x/1.obj", "x/2.obj")
    rows = [["Path", "Class ", "SPLIT"], ["x/1.obj", "03001627", "TEST"], ["x/2.obj", '"bed, double"', "Train"]]
    for delimiter in ";\t,":
        (tmp_path / "t.csv").write_text("".join(delimiter.join(row) + "\r\n" for row in rows), encoding="utf-8-sig")
        assert facts(find_meshes(tmp_path / "t.csv")) == [
            ("x/2.obj", "bed, double", "train"),
            ("x/1.obj", "chair", "test"),
        ]
    (tmp_path / "t.csv").write_text('path,class,caption\nx/1.obj,bed,"two\nlines"\n,,\n  , \n,bed,\n,bed\n')
    found = find_meshes(tmp_path / "t.csv")
    assert [source.name for source in found if not source.problem] == ["x/1.obj"]
    problems = {source.name: source.problem for source in found if source.problem}
    assert set(problems) == {"line 6", "line 7"} and len(set(problems.values())) == 1
    (tmp_path / "t.csv").write_text("path,class\n,\n,\n")
    with pytest.raises(DataError, match="lists no mesh"):
        find_meshes(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("path,class\nx/1.obj,stühle\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        find_meshes(tmp_path / "t.csv")
