"""
Collect the wheels that a machine without a network lacks, or install them there.

    python benchmarks/gpu/wheels.py --python-version 3.12 --present pyarrow pandas matplotlib aiohttp tabulate
    python benchmarks/gpu/wheels.py --install SITE        # there, with any Python; then PYTHONPATH=SITE:.

The machine is taken to have torch, transformers and accelerate, what these need, and whatever `--present` names, with
what that needs. Everything else that `step_trl` requires is downloaded in the versions that are installed here. The
command fails if the wheels and the working tree together are larger than `--limit` MiB.

Problems of the larger testbed are drawn without `reasoning-gym` (`chains.py`), which is therefore not among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PRESENT = ("torch", "transformers", "accelerate")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
SMALLEST = ("--list",)  # for tests, which download nothing
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def closure(roots: list[str], python_version: str, known: set[str] = frozenset()) -> dict[str, str]:
    """Return the installed versions of distributions and of all that they need, except for those that are `known`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": ""}
    found: dict[str, str] = {}
    waiting = [canonicalize_name(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found or name in known:
            continue
        try:
            own = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(
                f"{name}: is not installed here, so its version and what it needs are not known."
            ) from None
        found[name] = own.version
        needs = [Requirement(text) for text in own.requires or ()]
        waiting += [
            canonicalize_name(need.name) for need in needs if need.marker is None or need.marker.evaluate(environment)
        ]
    return found


def missing(present: list[str], python_version: str) -> dict[str, str]:
    """Return the versions of what `step_trl` needs beyond what is present."""
    known = closure([*PRESENT, *present], python_version)
    found = closure(["step_trl"], python_version, set(known))
    del found["step-trl"]  # the tree itself travels
    return dict(sorted(found.items()))


def download(packages: dict[str, str], folder: Path, python_version: str) -> None:
    """Download one wheel of each package, for x86-64."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()  # two versions of a package would stop the installation
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    names = [f"{name}=={version}" for name, version in packages.items()]
    subprocess.run([*PIP, "download", "--quiet", *only, *platforms, "--dest", str(folder), *names], check=True)


def tree_bytes() -> int:
    """Return the bytes of the files that travel without being named: tracked ones, and others that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def check_size(folder: Path, limit: float) -> None:
    """Print the sizes, and fail if they are above the limit."""
    sizes = sorted(((file.stat().st_size, file.name) for file in folder.glob("*.whl")), reverse=True)
    wheels, tree = sum(size for size, _ in sizes), tree_bytes()
    for size, name in sizes:
        print(f"{size / 2**20:7.2f} MiB  {name}")
    text = f"{wheels / 2**20:.1f} MiB of wheels and {tree / 2**20:.1f} MiB of the tree"
    if wheels + tree > limit * 2**20:
        largest = ", ".join(name.partition("-")[0] for _, name in sizes[:3])
        raise SystemExit(
            f"{text} are more than {limit:g} MiB. If the machine has some of them, set --present: {largest}."
        )
    print(f"{text}; at most {limit:g} MiB travel")


def install(folder: Path, site: Path) -> None:
    """Install all wheels of a folder into another one, without a network."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--folder: {folder} has no wheels. Collect them first, on a machine with a network.")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    subprocess.run([*PIP, "install", *options, "--target", str(site), *map(str, wheels)], check=True)
    print(f"{len(wheels)} packages in {site}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheels", help="by default %(default)s")
    parser.add_argument("--python-version", default="{}.{}".format(*sys.version_info), help="of the machine")
    parser.add_argument("--present", nargs="*", default=[], metavar="NAME", help="further packages that it has")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB that wheels and tree may have together")
    parser.add_argument("--list", action="store_true", help="only print what would be downloaded")
    parser.add_argument("--install", type=Path, metavar="SITE", help="install the wheels of the folder into this one")
    options = parser.parse_args()
    if options.install is not None:
        install(options.folder, options.install)
        return
    packages = missing(options.present, options.python_version)
    print(*(f"{name}=={version}" for name, version in packages.items()), sep="\n")
    if not options.list:
        download(packages, options.folder, options.python_version)
        check_size(options.folder, options.limit)


if __name__ == "__main__":
    main()
