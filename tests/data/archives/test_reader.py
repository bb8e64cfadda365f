"""Archives that are read without being unpacked: what they give, and by which words the bad ones are refused."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.data.archives import reader
from fadeformer.errors import UserError

# In an order that is not the alphabet's; one does not shrink, one has no bytes, one is longer than a block.
FILES = {"b/2.png": np.random.default_rng(0).bytes(700), "b/1.png": b"", "a.csv": b"x" * 1500, "ä/ü.png": b"1"}


def zipped(files=FILES, *, method=zipfile.ZIP_DEFLATED, **fields):
    """A zip; `fields` are set on the entry of its last file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("b/", b"")
        for number, (name, content) in enumerate(list(files.items()), 1):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
            if number == len(files):
                for field, value in fields.items():
                    setattr(info, field, value)
    return buffer.getvalue()


def packed(files=FILES, kind=tarfile.REGTYPE, *, layout=tarfile.PAX_FORMAT, **fields):
    """A tar; the kind and `fields` are those of its last entry."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        folder = tarfile.TarInfo("./b")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, (name, content) in enumerate(files.items(), 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if number == len(files):
                info.type = kind
                for field, value in fields.items():
                    setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in data
    return data.replace(old, new)


def doubled_directory() -> bytes:
    """A zip whose directory names the bytes of one member 1,500 times, each harmless alone."""
    one = zipped({"0000": bytes(range(256)) * 4000})
    start = one.rindex(b"PK\x01\x02")
    end = one.index(b"PK\x05\x06")
    names = [f"{number:04}".encode() for number in range(1500)]
    directory = b"".join(put(one[start:end], b"0000", name) for name in names)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1500, 1500, len(directory), start, 0)
    return one[:start] + directory + tail


def hidden_entry() -> bytes:
    """A zip in whose directory the last entry stands in the comment of the one before."""
    data = bytearray(zipped({"a": b"1", "bc": b"2"}))
    last = data.rindex(b"PK\x01\x02")
    length = data.rindex(b"PK\x01\x02", 0, last) + 32
    data[length : length + 2] = struct.pack("<H", data.index(b"PK\x05\x06") - last)
    return bytes(data)


class Pipe(io.BytesIO):
    """What one can write to but not go back in, so that a zip's sizes stand behind its members."""

    def seekable(self):
        return False

    def seek(self, *args):
        raise io.UnsupportedOperation


def streamed() -> bytes:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return pipe.getvalue()


@pytest.fixture(params=["zip", "stored zip", "streamed zip", "tar", "gnu tar", "tar.gz", "two streams", "folder"])
def good(request, tmp_path):
    path = tmp_path / "archive.of-any-name"
    whole = packed()
    if request.param == "folder":
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path
    path.write_bytes(
        {
            "zip": zipped(),
            "stored zip": zipped(method=zipfile.ZIP_STORED),
            "streamed zip": streamed(),
            "tar": whole,
            "gnu tar": packed(layout=tarfile.GNU_FORMAT),
            "tar.gz": gzip.compress(whole),
            "two streams": gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]) + bytes(100),
        }[request.param]
    )
    return path


def test_all_kinds_give_the_same_files_in_their_own_order(good):
    order = sorted(FILES) if good.is_dir() else list(FILES)
    assert sorted(reader.list_members(good)) == sorted((name, len(content)) for name, content in FILES.items())
    assert dict(reader.iter_members(good)) == FILES
    assert [name for name, _ in reader.iter_members(good)] == order


def test_only_wanted_files_are_read(good, monkeypatch):
    wanted = {"b/1.png", "ä/ü.png", "not there"}
    assert dict(reader.iter_members(good, wanted.__contains__)) == {name: FILES[name] for name in wanted & set(FILES)}
    monkeypatch.setattr(reader, "MAX_MEMBER_BYTES", 0)
    assert list(reader.iter_members(good, lambda name: False)) == []


def test_any_file_of_a_zip_or_a_folder_from_many_threads(good):
    if tarfile.is_tarfile(good) if good.is_file() else False:
        with pytest.raises(UserError, match=r"a tar is read from front to back only; unpack it"):
            reader.read_member(good, "a.csv")
        return
    names = list(FILES) * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: reader.read_member(good, name), names)) == [FILES[name] for name in names]
    with pytest.raises(UserError, match=r"'none\.png' is not there|has no file 'none\.png'"):
        reader.read_member(good, "none.png")
    with pytest.raises(UserError, match=r"'b' is a folder|has no file 'b'"):
        reader.read_member(good, "b")


def test_a_zip_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "a.zip"
    for content in (b"old", b"newer"):
        path.write_bytes(zipped({"a": content}))
        assert reader.read_member(path, "a") == content


def test_a_zip_of_more_images_than_its_oldest_count_can_tell(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(2**16):  # NIH's ChestX-ray14 has 112,120
            archive.writestr(f"{number}.png", b"1")
    assert len(reader.list_members(tmp_path / "a.zip")) == 2**16


def test_a_file_larger_than_the_limit_is_refused_only_if_it_is_wanted(good, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(UserError, match=r"'a\.csv' has 1,500 bytes; an image may have 1,000"):
        list(reader.iter_members(good))
    assert len(list(reader.iter_members(good, lambda name: name != "a.csv"))) == 3


def test_what_an_operating_system_left_behind_is_passed_over(tmp_path):
    rubbish = ["__MACOSX/a/._1.png", "a/._1.png", "a/.DS_Store", "Thumbs.db", "a/desktop.ini", ".cache/2.png"]
    files = {"a/1.png": b"1"} | dict.fromkeys(rubbish, b"?")
    for data in (zipped(files), packed(files)):
        (tmp_path / "archive").write_bytes(data)
        assert reader.list_members(tmp_path / "archive") == [("a/1.png", 1)]


def test_names_have_one_form(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed({"./a//b.png": b"1", "c.png": b"2"}))
    assert dict(reader.iter_members(tmp_path / "a.tar")) == {"a/b.png": b"1", "c.png": b"2"}


def test_names_that_are_one_on_another_system_are_found():
    names = ["a/X.png", "A/x.png", "b.png", "e\u0301.png", "\u00e9.png", "STRASSE", "straße"]
    assert reader.find_name_collisions(names) == [
        ("A/x.png", "a/X.png"),
        ("STRASSE", "straße"),
        ("e\u0301.png", "\u00e9.png"),
    ]
    assert reader.find_name_collisions(["a", "b", "a"]) == []


UNSAFE = {
    "../x.png": r"'\.\./x\.png' leaves its folder by \.\.",
    "a/../../x.png": r"leaves its folder by \.\.",
    "/etc/passwd": r"'/etc/passwd' has an absolute name",
    "C:/x.png": r"'C:/x\.png' has an absolute name",
    "c:x.png": "has an absolute name",
    "//server/share/x.png": "has an absolute name",
    "\\\\server\\x.png": "has a backslash in its name",
    "a\\..\\x.png": "has a backslash in its name",
    "a\nb.png": "or a control character in it",
}


@pytest.mark.parametrize(("name", "message"), UNSAFE.items())
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path, name, message):
    for data in (zipped({"a": b"", name: b"1"}), packed({"a": b"", name: b"1"}), gzip.compress(packed({name: b"1"}))):
        (tmp_path / "archive").write_bytes(data)
        with pytest.raises(UserError, match=message + ".*all of it is refused: take that out, or pack it anew"):
            reader.list_members(tmp_path / "archive")


def link(name: str) -> int:
    return (getattr(stat, name) | 0o644) << 16


BAD = {
    "zip: a symbolic link": (zipped(external_attr=link("S_IFLNK")), "'ä/ü.png' is a symbolic link"),
    "zip: a device": (zipped(external_attr=link("S_IFBLK")), "'ä/ü.png' is a device"),
    "zip: encrypted": (zipped(flag_bits=0x801), "'ä/ü.png' is encrypted"),
    "zip: strongly encrypted": (zipped({"a": b"1"}, flag_bits=0x40), "'a' is encrypted"),
    "zip: another method": (zipped({"a": b"1"}, method=zipfile.ZIP_LZMA), "'a' is compressed by method 14"),
    "zip: a bomb of shared bytes": (doubled_directory(), r"bytes would grow to 1,536,000,000, as a zip bomb does"),
    "zip: longer than it says": (zipped({"a": b"123456" * 9}, file_size=53), "Bad CRC-32 for file 'a'"),
    "zip: shorter than it says": (zipped({"a": b"123456" * 9}, file_size=55), "'a' has another size than its header"),
    "zip: more compressed bytes than it says": (
        zipped({"a": bytes(5000), "b": b""}, method=zipfile.ZIP_STORED, compress_size=5000),
        "'b' has another size than its header says",
    ),
    "zip: another checksum": (zipped({"a": b"1"}, CRC=1), "Bad CRC-32 for file 'a'"),
    "zip: another name at the member": (
        zipped({"name": b"1"}).replace(b"name", b"eman", 1),
        "File name in directory 'name' and header b'eman' differ",
    ),
    "zip: a name twice": (put(zipped({"aa": b"1", "ab": b"2"}), b"ab", b"aa"), "'aa' stands in it twice"),
    "zip: a name twice, written in two ways": (zipped({"a/b": b"1", "a//b": b"2"}), "'a/b' stands in it twice"),
    "zip: a name that is not UTF-8": (put(zipped(), "ü".encode(), b"\xff\xff"), "a name that cannot be decoded"),
    "zip: a NUL in a name": (put(zipped({"a.png.exe": b"1"}), b"g.exe", b"g\0exe"), r"'a\.png\\x00exe' has a name"),
    "zip: without its directory": (zipped()[:300], "truncated or damaged"),
    "zip: a directory that hides an entry": (hidden_entry(), "2 of 3 entries found"),
    "tar: a hard link": (packed(kind=tarfile.LNKTYPE, linkname="a.csv"), "'ä/ü.png' is a hard link"),
    "tar: a device": (packed(kind=tarfile.CHRTYPE), "is a device"),
    "tar: a pipe": (packed(kind=tarfile.FIFOTYPE), "is a pipe"),
    "tar: a sparse file": (packed(kind=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    "tar: a newer sparse file": (packed(pax_headers={"GNU.sparse.size": "9999999999"}), "is a sparse file"),
    "tar: an unknown kind": (packed(kind=b"Z"), "is an entry of the unknown kind b'Z'"),
    "tar: a name twice": (packed({"a": b"1"})[:-9216] + packed({"a": b"2"}), "'a' stands in it twice"),
    "tar: no end": (packed({"a": b"1"})[:1536], "truncated or damaged.*it ends too early"),
    "tar: cut in a member": (packed({"a": bytes(5000)})[:3000], "it ends too early"),
    "tar: cut in a header": (packed({"a": b"1"})[:700], "it ends too early"),
    "tar: more behind its end": (packed({"a": b"1"}) + packed({"b": b"2"}), "more data stands behind its end"),
    "tar: a damaged header": (packed({"a": b"1", "b": b"2"}).replace(b"b\0\0", b"c\0\0"), "not a header of a file"),
    "tar: a name that is not UTF-8": (
        packed({"ü": b"1"}, layout=tarfile.GNU_FORMAT, name="\udcff"),
        "holds a name that cannot be decoded",
    ),
    "tar: a huge extended header": (
        packed({"a": bytes(2**20 + 1)}, kind=tarfile.XHDTYPE),
        "truncated or damaged.*a header of 1048577 bytes",
    ),
    "tar: a wrong extended header": (packed({"a": b"9 no newline"}, kind=tarfile.XHDTYPE), "not an extended header"),
    "tar: no file's name": (packed({".": b"1"}), r"'\.' has no name of a file"),
    "tar.gz: cut in its checksum": (gzip.compress(packed())[:-1], "it ends too early"),
    "tar.gz: a wrong checksum": (gzip.compress(packed())[:-8] + bytes(8), "truncated or damaged"),
    "tar.gz: rubbish behind": (gzip.compress(packed()) + b"rubbish", "truncated or damaged"),
    "tar.gz: no tar": (gzip.compress(b"1" * 1024), "not a header of a file"),
    "an empty file": (b"", "is empty; fetch the file again"),
    "bzip2": (b"BZh91AY" + bytes(600), "is a bzip2 file; a zip, a tar, a tar.gz or a folder is read"),
    "a text": (b"<!DOCTYPE html>" * 60, "is no archive; a zip, a tar"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_told(tmp_path, case):
    data, message = BAD[case]
    path = tmp_path / "bad.archive"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        list(reader.iter_members(path))
    assert str(error.value).startswith(f"{path}: ")


def test_the_long_names_of_old_tars_are_read(tmp_path):
    name = "/".join(["long" * 10] * 8) + ".png"
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "a.tar").write_bytes(packed({name: b"1", "b": b"2"}, layout=layout))
        assert dict(reader.iter_members(tmp_path / "a.tar")) == {name: b"1", "b": b"2"}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    (path / "a.png").write_bytes(b"1")
    (tmp_path / "secret").write_bytes(b"?")
    (tmp_path / "other").mkdir()
    return path


def test_a_link_that_stays_in_the_folder_is_a_file(folder):
    (folder / "b.png").symlink_to("a.png")
    assert dict(reader.iter_members(folder)) == {"a.png": b"1", "b.png": b"1"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../secret", r"'b\.png' is a symbolic link that leaves the folder"),
        ("/etc/passwd", "is a symbolic link that leaves the folder"),
        ("../other", "is a link to a folder"),
        (".", "is a link to a folder"),
        ("b.png", "is a link that leads nowhere"),
        ("../none", "is a link that leads nowhere"),
    ],
)
def test_a_link_in_a_folder_that_leads_elsewhere_is_refused(folder, target, message):
    (folder / "b.png").symlink_to(target)
    with pytest.raises(UserError, match=message):
        reader.list_members(folder)
    with pytest.raises(UserError, match=message + "|leaves the folder|is a folder"):
        reader.read_member(folder, "b.png")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", ""])
def test_a_name_asked_for_cannot_leave_the_folder(folder, name):
    with pytest.raises(UserError, match=r"leaves its folder|absolute name|backslash|no name of a file"):
        reader.read_member(folder, name)


@pytest.mark.parametrize(("name", "message"), [(b"\xff.png", "cannot be decoded"), (b"a\\b.png", "has a backslash")])
def test_a_name_in_a_folder_that_no_other_system_could_read_is_refused(folder, name, message):
    os.close(os.open(os.fsencode(folder) + b"/" + name, os.O_CREAT))
    with pytest.raises(UserError, match=message) as error:
        reader.list_members(folder)
    str(error.value).encode()  # can be printed


def test_a_folder_that_may_not_be_read_is_told(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); change its permissions"):
        reader.list_members(folder)


def test_what_is_not_there_and_a_pipe_are_no_archives(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        reader.list_members(tmp_path / "none.zip")
    os.mkfifo(tmp_path / "scans.zip")
    with pytest.raises(UserError, match=r"scans\.zip: is no file and no folder"):
        reader.list_members(tmp_path / "scans.zip")


WHOLE = {"zip": zipped(), "tar": packed(), "tar.gz": gzip.compress(packed(), mtime=0)}


def found_in(path):
    try:
        return dict(reader.iter_members(path))
    except UserError:
        return None


@given(kind=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_archive_never_gives_less(tmp_path_factory, kind, share):
    path = tmp_path_factory.mktemp("cut") / "archive"
    path.write_bytes(WHOLE[kind][: int(len(WHOLE[kind]) * share)])
    assert found_in(path) in (None, FILES)  # the latter where what was lost is the padding of a tar


@given(
    kind=st.sampled_from(sorted(WHOLE)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_never_give_wrong_images(tmp_path_factory, kind, flips):
    data = bytearray(WHOLE[kind])
    for share, mask in flips:
        data[int(len(data) * share)] ^= mask
    path = tmp_path_factory.mktemp("flip") / "archive"
    path.write_bytes(data)
    found = found_in(path)
    assert found in (None, FILES) or kind == "tar"  # which has no checksum of its content


def test_the_published_archives_are_read(real_data):
    found = reader.list_members(real_data / "chestxray14" / "images_001.tar.gz")
    assert len(found) == 1000
    assert found[0].name == "images/00000001_000.png"
    assert len(reader.list_members(real_data / "isic2019" / "ISIC_2019_Training_Input.zip")) == 10_015
    path = real_data / "mednist" / "mednist.zip"
    last = reader.list_members(path)[-1]
    assert len(reader.read_member(path, last.name)) == last.size
