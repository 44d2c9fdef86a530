"""CIFAR's archives as they were published: where they are, their checksums, and the files in them. Data only.

CIFAR10.sha256, CIFAR10.members
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CIFAR10", "CIFAR10_BINARY", "CIFAR100", "CIFAR100_BINARY", "ArchiveSpec"]


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec:
    """A published archive: where it is, what it is, and the files in it.

    Attributes:
        name: its file name.
        urls: https addresses, the publisher's first; the hash makes any mirror as good.
        sha256: of the archive.
        size: bytes, if known.
        folder: the folder in it that holds the files.
        members: names of those files.
        member_md5: the MD5 of each; empty where none are published, so that an unpacked folder counts as unverified.
    """

    name: str
    urls: tuple[str, ...]
    sha256: str
    size: int | None
    folder: str
    members: tuple[str, ...]
    member_md5: Mapping[str, str] = field(hash=False)


# The second address is PaddlePaddle's mirror: its own loader checks the publisher's sums.
CIFAR10 = ArchiveSpec(
    name="cifar-10-python.tar.gz",
    urls=(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    ),
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    size=170_498_071,
    folder="cifar-10-batches-py",
    members=("batches.meta", *(f"data_batch_{k}" for k in range(1, 6)), "test_batch"),
    member_md5={
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR100 = ArchiveSpec(
    name="cifar-100-python.tar.gz",
    urls=(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
    ),
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    size=169_001_437,
    folder="cifar-100-python",
    members=("meta", "train", "test"),
    member_md5={
        "meta": "7973b15100ade9c7d40fb424638fde48",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
)
# The binary form is read where a user has it, never fetched. Its publisher gives MD5 sums of the archives, and none of
# their members; the SHA-256 are those that MLDatasets.jl, GoMLX and Ruby's TorchVision check the same archives with.
CIFAR10_BINARY = ArchiveSpec(
    name="cifar-10-binary.tar.gz",
    urls=(),
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",  # MD5 c32a1d4ab5d03f1284b67883e8d87530
    size=170_052_171,
    folder="cifar-10-batches-bin",
    members=("batches.meta.txt", *(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"),
    member_md5={},
)
CIFAR100_BINARY = ArchiveSpec(
    name="cifar-100-binary.tar.gz",
    urls=(),
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",  # MD5 03b5dce01913d631647c71ecec9e9cb8
    size=168_513_733,
    folder="cifar-100-binary",
    members=("fine_label_names.txt", "train.bin", "test.bin"),
    member_md5={},
)
