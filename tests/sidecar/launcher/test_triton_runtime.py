"""The packaged Triton server: the platforms that it supports, and the models that it gets."""

import pytest

from kar_sidecar.errors import PreconditionError
from kar_sidecar.launcher.triton_runtime import check_platform, find_libpython, link_models

pytestmark = pytest.mark.unit

GLIBC = ("glibc", "2.36")


def test_this_platform_is_checked():
    check_platform("Linux", "x86_64", GLIBC, (3, 11))
    check_platform("Linux", "x86_64", ("glibc", "2.35"), (3, 13))


@pytest.mark.parametrize(
    ("platform", "complaint"),
    [
        (("Darwin", "arm64", ("", ""), (3, 11)), "Linux x86-64, not Darwin arm64"),
        (("Linux", "aarch64", GLIBC, (3, 11)), "NVIDIA's container"),
        (("Linux", "x86_64", ("glibc", "2.31"), (3, 11)), "glibc 2.35 or newer, not glibc 2.31"),
        (("Linux", "x86_64", ("", ""), (3, 11)), "another C library"),
        (("Linux", "x86_64", GLIBC, (3, 14)), "Python 3.14"),
    ],
)
def test_another_platform_is_refused(platform, complaint):
    with pytest.raises(PreconditionError, match=complaint):
        check_platform(*platform)


def test_libpython_is_found_in_the_first_folder_that_has_it(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    for folder in folders[1:]:
        (folder / "libpython3.11.so.1.0").touch()
    assert find_libpython("libpython3.11.so.1.0", folders) == tmp_path / "b"


def test_a_missing_libpython_names_the_package(tmp_path):
    with pytest.raises(PreconditionError, match=r"apt-get install libpython3\.11`"):
        find_libpython("libpython3.11.so.1.0", [tmp_path, "/nonexistent"])


def test_models_of_several_releases_share_a_folder_and_replace_their_former_links(tmp_path):
    for release, model in (("one", "a"), ("one", "b"), ("two", "c"), ("three", "a")):
        (tmp_path / release / model).mkdir(parents=True)
    live = tmp_path / "live"
    assert link_models(tmp_path / "one", live) == ["a", "b"]
    assert link_models(tmp_path / "two", live) == ["c"]
    assert link_models(tmp_path / "three", live) == ["a"]
    assert sorted(path.name for path in live.iterdir()) == ["a", "b", "c"]
    assert (live / "a").resolve() == tmp_path / "three" / "a"
