"""Public weights: where they lie, what they are and what was published of them.

URLs, hashes and licence of Larq Zoo's files are those of larq-zoo 2.4; accuracies are of its
documentation. The PyTorch checkpoints lie behind pages that only a browser opens; nothing is known
of their hashes, and the repositories of ReActNet and AdamBNN name no licence.
"""

from __future__ import annotations

from dataclasses import dataclass

LARQ = "https://github.com/larq/zoo/releases/download/"
SHAREPOINT = "https://hkustconnect-my.sharepoint.com/:u:/g/personal/zliubq_connect_ust_hk/"
DRIVE = "https://drive.google.com/file/d/"


@dataclass(frozen=True)
class PublicFile:
    """A file of weights that its authors published.

    name: what `load_weights` calls it. model: the network, for `create_model`.
    kind: "keras" (HDF5) or "torch" (.pth.tar).
    url: of the file; None where a browser is needed, at `page`.
    sha256: of all its bytes; None where nobody published it.
    licence: an SPDX name; None where none is named.
    top1, top5: percent of ImageNet's validation images, as published with the file.
    preprocessing: the name of what images went through (`bitkernels.models.preprocessing`).
    head: whether the last layers are in it.
    """

    name: str
    model: str
    kind: str
    url: str | None
    page: str
    sha256: str | None
    licence: str | None
    top1: float | None
    top5: float | None
    preprocessing: str
    head: bool = True


# model; release, file and sha256; release and sha256 of the file without a head; top-1, top-5.
_LARQ = (
    ("quicknet_small", "quicknet-v1.0", "quicknet_small_weights",
     "1ac3b07df7f5a911dd0b49febb2486428ddf1ca130297c403815dfae5a1c71a2", "quicknet-v1.0",
     "be8ba657155846be355c5580d1ea56eaf8282616de065ffc39257202f9f164ea", 59.4, 81.8),
    ("quicknet", "quicknet-v1.0", "quicknet_weights",
     "8aba9e4e5f8d342faef04a0b2ae8e562da57dbb7d15162e8b3e091c951ba756c", "quicknet-v1.0",
     "204414e438373f14f6056a1c098249f505a87dd238e18d3a47a9bd8b66227881", 63.3, 84.6),
    ("quicknet_large", "quicknet-v1.0", "quicknet_large_weights",
     "c5158e8a59147b31370becd937825f4db8a5cdf308314874f678f596629be45c", "quicknet-v1.0",
     "adcf154a2a8007e81bd6af77c035ffbf54cd6413b89a0ba294e23e76a82a1b78", 66.9, 87.0),
    ("real_to_binary_net", "r2b-v0.1.0", "r2b_weights",
     "e8fd16ca1ab9810ac3835f24f5c62758a57bc32a615f73aaa50d382d2b9617e1", "r2b-v0.1.0",
     "4ec47abf1a4da5c65f4908076257e8d5c812673891089a88c9d9e84e949d1dab", 65.01, 85.72),
    ("binary_densenet28", "binary_densenet-v0.1.0", "binary_densenet_28_weights",
     "21fe3ca03eed244df9c41a2219876fcf03e73800932ec96a3e2a76af4747ac53", "binary_densenet-v0.1.0",
     "a376df1e41772c4427edd1856072b934a89bf293bf911438bf6f751a9b2a28f5", 60.91, 82.83),
    ("binary_densenet37", "binary_densenet-v0.1.0", "binary_densenet_37_weights",
     "8056a5d52c3ed86a934893987d09a06f59a5166aa9bddcaedb050f111d0a7d76", "binary_densenet-v0.1.0",
     "4e12bca9fd27580a5b833241c4eb35d6cc332878c406048e6ca8dbbc78d59175", 62.89, 84.19),
    ("binary_densenet37_dilated", "binary_densenet-v0.1.0", "binary_densenet_37_dilated_weights",
     "15c1bcd79b8dc22971382fbf79acf364a3f51049d0e584a11533e6fdbb7363d3", "binary_densenet-v0.1.1",
     "8b31fbfdc8de08a46c6adcda1ced48ace0a2ff0ce45a05c72b2acc27901dd88b", 64.34, 85.15),
    ("binary_densenet45", "binary_densenet-v0.1.0", "binary_densenet_45_weights",
     "d00a0d26fbd2dba1bfba8c0306c770f3aeea5c370e99f963bb239bd916f72c37", "binary_densenet-v0.1.0",
     "e72d5cc6b0afe4612f8be7b1f9bb48a53ba2c8468b57bf1266d2900c99fd2adf", 64.59, 85.21),
    ("meliusnet22", "meliusnet22-v0.1.0", "meliusnet22_weights",
     "c1ba85e8389ae326009665ec13331e49fc3df4d0f925fa8553e224f7362c18ed", "meliusnet22-v0.1.1",
     "abfc5c50049d72a14e44df0c1cb73896ece2a1ab4bf9bb48fede6cc2f5e0b58f", 62.4, 83.9),
    ("binary_resnet_e18", "resnet_e-v0.1.0", "resnet_e_18_weights",
     "bde4a64d42c164a7b10a28debbe1ad5b287c499bc0247ecb00449e6e89f3bf5b", "resnet_e-v0.1.0",
     "14cb037e47d223827a8d09db88ec73d60e4153a4464dca847e5ae1a155e7f525", 58.32, 80.79),
    ("birealnet18", "birealnet-v0.3.0", "birealnet_weights",
     "6e6efac1584fcd60dd024198c87f42eb53b5ec719a5ca1f527e1fe7e8b997117", "birealnet-v0.3.0",
     "5148b61c0c2a1094bdef811f68bf4957d5ba5f83ad26437b7a4a6855441ab46b", 57.47, 79.84),
    ("dorefanet", "dorefanet-v0.1.0", "dorefanet_weights",
     "645d7839d574faa3eeeca28f3115773d75da3ab67ff6876b4de12d10245ecf6a", "dorefanet-v0.1.1",
     "8650e8a86d8d3968722cf5f20bcebe74d6d7bb45bbf03c4bb8c6486343f37e31", 53.39, 76.50),
    ("xnornet", "xnornet-v0.2.0", "xnornet_weights",
     "e6ba24f785655260ae76a2ef1fab520e3528243d9c8fac430299cd81dbeabe10", "xnornet-v0.2.1",
     "20a17423090b2c80c6b7a6b62346faa4b2b7dc8d4da99efa792c9351cf86c3d5", 44.96, 69.18),
    ("binary_alexnet", "binary_alexnet-v0.3.0", "binary_alexnet_weights",
     "7fc065c47c5c1d92389e0bb988ce6df6a4fa09d803b866e2ba648069d6652d63", "binary_alexnet-v0.2.1",
     "1d41b33ff39cd28d13679392641bf7711174a96d182417f91df45d0548f5bb47", 36.30, 61.53),
)

# name, model, page, licence, top-1, preprocessing
_TORCH = (
    ("reactnet_a.reactnet", "reactnet_a",
     f"{SHAREPOINT}EW1FVkAKN5dJg1ns_CcMtQoBJAy1Yxx-b7lpaTFjTJIUKw?e=oyebWy", None, 69.5,
     "imagenet"),
    ("reactnet_a.adambnn", "reactnet_a",
     f"{SHAREPOINT}EXEsfAt42gNLqfzt09BMoTwBbYT6sxH5VkZ_9DmBWhJxXg?e=fd4f5v", None, 70.5,
     "imagenet"),
    ("reactnet18.reactnet", "reactnet18",
     f"{SHAREPOINT}EY9P7mxs-8BLkTlqMZif4s4BnNWcKbUnvqeA_CvN3c9q4w?e=IpUyF4", None, 65.9,
     "imagenet"),
    ("bnext_t.bnext", "bnext_t", f"{DRIVE}1CJ0XOEhoHuNe-tDYJaAOd1j4YyNXuyas/view", "Apache-2.0",
     72.4, "bnext"),
    ("bnext_s.bnext", "bnext_s", f"{DRIVE}1NcVM5Qb1K9Oq_sjEA1lGtp7kVbsfTLsa/view", "Apache-2.0",
     76.1, "bnext"),
    ("bnext_m.bnext", "bnext_m", f"{DRIVE}1xyKnA6SsG4ZpguNQQrB6Yz-J5dzXYfKE/view", "Apache-2.0",
     78.3, "bnext"),
    ("bnext_l.bnext", "bnext_l", f"{DRIVE}1XGKcX2Zl_fIU9wPBDjTTxstOBfwQH8xc/view", "Apache-2.0",
     80.6, "bnext"),
)


def _rows() -> list[PublicFile]:
    rows = []
    for model, release, file, sha256, bare_release, bare_sha256, top1, top5 in _LARQ:
        rows += [
            PublicFile(f"{model}.larq", model, "keras", f"{LARQ}{release}/{file}.h5",
                       "https://github.com/larq/zoo/releases", sha256, "Apache-2.0", top1, top5,
                       "larq"),
            PublicFile(f"{model}.larq_notop", model, "keras",
                       f"{LARQ}{bare_release}/{file}_notop.h5",
                       "https://github.com/larq/zoo/releases", bare_sha256, "Apache-2.0", None,
                       None, "larq", head=False)]
    rows += [PublicFile(name, model, "torch", None, page, None, licence, top1, None, preprocessing)
             for name, model, page, licence, top1, preprocessing in _TORCH]
    return rows


_PUBLIC = {row.name: row for row in _rows()}


def public_weights(model: str | None = None) -> list[PublicFile]:
    """The public files of weights, of one network or of all."""
    return [row for row in _PUBLIC.values() if model in (None, row.model)]


def find(name: str) -> PublicFile | None:
    """The file of that name, or the first one of the network of that name."""
    return _PUBLIC.get(name) or next(iter(public_weights(name)), None)
