import dataclasses
import hashlib
import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastcifar.data import archive
from fastcifar.data.archive import CIFAR10, CIFAR100, ArchiveSpec, Source
from fastcifar.errors import DataError, DownloadError, OutputError
from tests.cifar_files import BATCHES, FOLDER, tiny_cifar10, tiny_members, write_archive

MEMBERS = tiny_members(per_file=10)
NAMES = ("batches.meta", *BATCHES)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, ArchiveSpec]:
    """An archive and the specification that it satisfies."""
    path = write_archive(tmp_path / "given.tar.gz", MEMBERS)
    spec = dataclasses.replace(
        CIFAR10,
        urls=("https://127.0.0.1:9/none",),
        sha256=sha256(path.read_bytes()),
        size=path.stat().st_size,
        member_md5={name: hashlib.md5(content).hexdigest() for name, content in MEMBERS.items()},
    )
    return path, spec


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fail on any fetch; a list of what was asked for."""
    asked: list[Any] = []

    def fetch(urls: Any, target: Path, **options: Any) -> str:
        asked.append(urls)
        raise DownloadError(f"{urls[0]} cannot be reached: no route")

    monkeypatch.setattr(archive, "fetch", fetch)
    return asked


def find(spec: ArchiveSpec, tmp_path: Path, data: Path | None = None, **options: Any) -> Source:
    return archive.find(
        spec, data=data, home=tmp_path / "home", allow_unverified=options.pop("allow", False), **options
    )


@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100], ids=lambda spec: spec.name)
def test_the_published_archives_are_well_described(spec: ArchiveSpec) -> None:
    assert len(spec.sha256) == 64
    assert set(spec.member_md5) == set(spec.members)
    assert all(len(md5) == 32 for md5 in spec.member_md5.values())
    assert all(url.startswith("https://") and spec.name in url for url in spec.urls)


def test_a_published_archive_is_verified(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    path, spec = tiny
    source = find(spec, tmp_path, path)
    assert (source.kind, source.path, source.verified, source.sha256) == ("archive", path, True, spec.sha256)
    assert dict(source.members()) == MEMBERS
    assert [name for name, _ in source.members()] == list(MEMBERS)
    assert not (tmp_path / "home").exists()


def test_members_come_in_the_order_of_the_archive(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    order = list(reversed(NAMES))
    path = write_archive(tmp_path / "b.tar.gz", {name: MEMBERS[name] for name in order})
    assert [name for name, _ in find(tiny[1], tmp_path, path, allow=True).members()] == order


def test_a_published_folder_is_verified(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    _, spec = tiny
    folder = tiny_cifar10(tmp_path / FOLDER, per_file=10)
    for data in (folder, tmp_path):  # itself, or the folder that it is in
        source = find(spec, tmp_path, data)
        assert (source.kind, source.path, source.verified, source.sha256) == ("folder", folder, True, spec.sha256)
        assert dict(source.members()) == MEMBERS
    renamed = folder.rename(tmp_path / "any name")
    assert find(spec, tmp_path, renamed).verified


def test_a_folder_with_the_archive_in_it_will_do(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    path, spec = tiny
    (tmp_path / "d").mkdir()
    moved = path.rename(tmp_path / "d" / spec.name)
    assert find(spec, tmp_path, tmp_path / "d").path == moved


def test_another_archive_has_to_be_allowed(tmp_path: Path) -> None:
    path = tiny_cifar10(tmp_path / "a.tar.gz")
    found = sha256(path.read_bytes())
    with pytest.raises(DataError, match=rf"a\.tar\.gz.*{found}.*{CIFAR10.sha256}.*--allow-unverified"):
        find(CIFAR10, tmp_path, path)
    source = find(CIFAR10, tmp_path, path, allow=True)
    assert (source.verified, source.sha256) == (False, found)
    assert len(dict(source.members())) == 7


def test_another_folder_has_to_be_allowed(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    _, spec = tiny
    folder = tiny_cifar10(tmp_path / FOLDER, per_file=10)
    content = MEMBERS["test_batch"] + b"x"
    (folder / "test_batch").write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    with pytest.raises(
        DataError, match=rf"test_batch: is not the published.*{md5}.*{spec.member_md5['test_batch']}.*--al"
    ):
        find(spec, tmp_path, folder)
    one = find(spec, tmp_path, folder, allow=True)
    assert not one.verified
    (folder / "test_batch").write_bytes(content + b"y")
    two = find(spec, tmp_path, folder, allow=True)
    assert len({one.sha256, two.sha256, spec.sha256}) == 3  # each content has its own name


def test_a_path_that_is_nothing_is_explained(tmp_path: Path) -> None:
    expected = r"expected cifar-10-python\.tar\.gz, or its unpacked folder cifar-10-batches-py"
    with pytest.raises(DataError, match=rf"nowhere: does not exist; {expected}"):
        find(CIFAR10, tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"empty: holds neither cifar-10-batches-py nor its files.*{expected}"):
        find(CIFAR10, tmp_path, tmp_path / "empty")
    (tmp_path / "page.html").write_text("<!DOCTYPE html>")
    with pytest.raises(DataError, match=rf"page\.html: is no gzip file; {expected}"):
        find(CIFAR10, tmp_path, tmp_path / "page.html")
    with pytest.raises(DataError, match="null: is no file or folder"):
        find(CIFAR10, tmp_path, Path("/dev/null"))
    with pytest.raises(DataError, match="too long"):
        find(CIFAR10, tmp_path, tmp_path / ("x" * 300))


def test_a_folder_that_lacks_files_names_them(tmp_path: Path) -> None:
    folder = tiny_cifar10(tmp_path / FOLDER)
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").rename(folder / "test_batch.bak")
    with pytest.raises(DataError, match=rf"{FOLDER}: lacks data_batch_3, test_batch; expected batches\.meta, data_b"):
        find(CIFAR10, tmp_path, tmp_path, allow=True)
    (folder / "data_batch_3").mkdir()
    with pytest.raises(DataError, match="lacks data_batch_3, test_batch"):
        find(CIFAR10, tmp_path, folder, allow=True)


def test_an_archive_that_lacks_files_names_them(tmp_path: Path) -> None:
    some = {name: MEMBERS[name] for name in NAMES if name not in {"data_batch_2", "test_batch"}}
    path = write_archive(tmp_path / "some.tar.gz", some)
    members = find(CIFAR10, tmp_path, path, allow=True).members()
    for _ in some:
        next(members)
    with pytest.raises(
        DataError, match=rf"some\.tar\.gz: lacks data_batch_2, test_batch in a folder {FOLDER}; expected"
    ):
        next(members)
    other = write_archive(tmp_path / "other.tar.gz", MEMBERS, folder="elsewhere")
    with pytest.raises(DataError, match=r"lacks batches\.meta, data_batch_1"):
        list(find(CIFAR10, tmp_path, other, allow=True).members())


def test_other_files_and_harmless_headers_are_passed_over(tmp_path: Path, tiny: tuple[Path, ArchiveSpec]) -> None:
    path = tmp_path / "again.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "packed again"}) as packed:
        for name, content in {"readme.html": b"<html>", **MEMBERS, "._test_batch": b"mac"}.items():
            entry = tarfile.TarInfo(f"./{FOLDER}/{name}")
            entry.size, entry.mtime = len(content), 1.5  # a fraction needs an extended header
            packed.addfile(entry, io.BytesIO(content))
    assert dict(find(tiny[1], tmp_path, path, allow=True).members()) == MEMBERS


def test_an_archive_at_home_is_used(tmp_path: Path, tiny: tuple[Path, ArchiveSpec], no_network: list[Any]) -> None:
    path, spec = tiny
    target = tmp_path / "home" / "downloads" / spec.name
    target.parent.mkdir(parents=True)
    path.rename(target)
    source = find(spec, tmp_path)
    assert (source.path, source.verified) == (target, True)
    assert no_network == []
    assert list(target.parent.iterdir()) == [target]  # not even a lock: the folder may be read-only


@pytest.mark.parametrize("wrong", [b"<html>", b"\x1f\x8bnot the right one"])
def test_a_wrong_archive_at_home_is_set_aside(
    tmp_path: Path,
    tiny: tuple[Path, ArchiveSpec],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: bytes,
) -> None:
    path, spec = tiny
    target = tmp_path / "home" / "downloads" / spec.name
    target.parent.mkdir(parents=True)
    target.write_bytes(wrong)

    def fetch(urls: Any, target: Path, **options: Any) -> str:
        assert options["sha256"] == spec.sha256
        assert options["size"] == spec.size
        target.write_bytes(path.read_bytes())
        return str(urls[0])

    monkeypatch.setattr(archive, "fetch", fetch)
    with caplog.at_level(logging.WARNING):
        source = find(spec, tmp_path)
    aside = target.with_name(f"{spec.name}.wrong-{sha256(wrong)[:8]}")
    assert aside.read_bytes() == wrong
    assert aside.name in caplog.text
    assert source.origin == spec.urls[0]
    assert dict(source.members()) == MEMBERS


def test_a_wrong_archive_at_home_can_be_allowed(tmp_path: Path, no_network: list[Any]) -> None:
    target = tmp_path / "home" / "downloads" / CIFAR10.name
    target.parent.mkdir(parents=True)
    tiny_cifar10(target)
    source = find(CIFAR10, tmp_path, allow=True)
    assert (source.path, source.verified) == (target, False)
    assert no_network == []


def test_without_network_and_data_one_line_says_what_to_do(tmp_path: Path, no_network: list[Any]) -> None:
    with pytest.raises(DownloadError) as caught:
        find(CIFAR10, tmp_path)
    message = str(caught.value)
    assert f"{CIFAR10.urls[0]} cannot be reached: no route" in message
    assert f"Put it at {tmp_path / 'home' / 'downloads' / CIFAR10.name} by hand" in message
    assert "--data PATH" in message
    assert "--dataset digits" in message
    assert "\n" not in message
    assert len(no_network) == 1


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(OutputError, match=r"home.*: cannot be written: "):
        find(CIFAR10, tmp_path)


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, tiny: tuple[Path, ArchiveSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spec = tiny

    def broken(path: Path) -> Any:
        raise OSError(5, "Input/output error", str(path))

    source = find(spec, tmp_path, path)
    path.unlink()
    with pytest.raises(DataError, match=r"given\.tar\.gz: cannot be read: No such file"):
        list(source.members())
    folder = tiny_cifar10(tmp_path / FOLDER, per_file=10)
    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(DataError, match=r"batches\.meta: cannot be read: Input/output error"):
        find(spec, tmp_path, folder)
    monkeypatch.setattr(archive, "file_sha256", broken)
    with pytest.raises(DataError, match=r"b\.tar\.gz: cannot be read: Input/output error"):
        find(spec, tmp_path, write_archive(tmp_path / "b.tar.gz", MEMBERS))
    monkeypatch.setattr(archive, "MAX_MEMBER", 100)
    with pytest.raises(DataError, match=r"batches\.meta: has \d+ bytes, more than the 100 allowed"):
        find(spec, tmp_path, folder)
