"""What was installed where something was computed."""

from importlib.metadata import PackageNotFoundError, version

from hftcli import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets", "tokenizers", "safetensors")


def list_versions() -> dict[str, str]:
    """Installed versions of hft and of what computes."""
    return {"hftcli": __version__, **{name: _find_version(name) for name in PACKAGES}}


def describe_versions(versions: dict[str, str], others: dict[str, str]) -> str:
    """Those of `versions` that `others` has as well, and not the same, for people; empty where none is."""
    return ", ".join(f"{name} {found}" for name, found in versions.items() if others.get(name, found) != found)


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
