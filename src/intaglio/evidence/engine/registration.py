"""Registration: a claim is loaded by its slug, and recorded only if it was committed before its run."""

from __future__ import annotations

import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from intaglio.errors import IntaglioError, did_you_mean
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import MAX_SEED_BASE, Claim
from intaglio.methods.registry import PUBLISHED


def load_claim(slug: str, tier: str | None = None) -> Claim:
    """Return the claim of a method, or refuse a tier that it is not made for."""
    if slug not in PUBLISHED:
        raise IntaglioError(f"there is no method named {slug!r}; {did_you_mean(slug, PUBLISHED)}")
    if tier not in ("cpu", "gpu", None):
        raise IntaglioError(f"the tier {tier!r} is unknown; accepted: cpu, gpu")
    name = f"intaglio.evidence.claims.{slug}"
    if find_spec(name) is None:
        raise IntaglioError(f"{slug} has no evidence yet: no claim is registered for it")
    claim: Claim = import_module(name).CLAIM
    if tier not in (None, claim.tier):
        raise IntaglioError(f"the claim of {slug} is not made for the tier {tier}; accepted: {claim.tier}")
    return claim


def check_machine(claim: Claim) -> None:
    """Refuse a claim whose tier this machine lacks."""
    if claim.tier == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise IntaglioError("the tier gpu needs a CUDA device, and this machine has none")


def check_arguments(claim: Claim, seed_base: int, units: int | None, workers: int) -> None:
    """Refuse arguments of `prove` that are out of range."""
    if not 0 <= seed_base < MAX_SEED_BASE:
        raise IntaglioError(f"the seed base is {seed_base}; accepted: 0 to {MAX_SEED_BASE - 1}")
    if workers < 1:
        raise IntaglioError(f"workers is {workers}; it must be at least 1")
    if units is not None and not 3 <= units <= 10_000:
        raise IntaglioError(f"units is {units}; accepted: 3 to 10,000")
    check_machine(claim)


def check_registered(claim: Claim, seed_base: int, units: int | None) -> None:
    """Refuse to record a claim that is not committed as it stands or has a record, and other units or seeds."""
    if units is not None or seed_base:
        raise IntaglioError("--record takes neither --units nor another --seed-base: the committed claim fixes both")
    path = records.CLAIMS / f"{claim.slug}.py"
    if git("rev-parse", "--show-toplevel", at=path.parent) is None:
        raise IntaglioError("records are written in a source checkout only, and this Intaglio is not in one")
    if git("ls-files", "--error-unmatch", path.name, at=path.parent) is None or git(
        "status", "--porcelain", "--", path.name, at=path.parent
    ):
        raise IntaglioError(f"the claim of {claim.slug} is not committed as it stands; commit {path.name} first")
    previous = records.committed(claim.slug)
    if previous is not None and previous.version >= claim.version:
        edited = ", and the claim was edited since" if previous.digest != claim.digest else ""
        raise IntaglioError(
            f"version {previous.version} of the claim of {claim.slug} has a record{edited}; a new run needs a higher"
            " version and its reason"
        )


def git(*words: str, at: Path) -> str | None:
    """Return what a git command prints, stripped; None if it fails or git is missing."""
    try:
        done = subprocess.run(["git", "-C", str(at), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of_code() -> str:
    """Return the commit of this checkout, with `+` if its Python files are changed; "" outside a checkout."""
    home = records.EVIDENCE
    if git("ls-files", "--error-unmatch", "__init__.py", at=home) is None:
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", f"{home.parent}/*.py", at=home)
    return (git("rev-parse", "HEAD", at=home) or "") + ("+" if changed else "")
