"""Versions of transformers that vwn is tested with."""

import warnings

import transformers
from packaging.version import Version

from vwn.common.errors import UserError

OLDEST, FIRST_UNTESTED = "5.17", "5.25"


def check_transformers(version: str = transformers.__version__) -> None:
    """Refuse a transformers that is too old, and warn of one that is newer than the tests.

    The models override private parts of transformers, which may change with any minor version.
    """
    supported = f"vwn is tested with transformers >={OLDEST},<{FIRST_UNTESTED}, and {version} is installed"
    install = f"pip install 'transformers>={OLDEST},<{FIRST_UNTESTED}'"
    if Version(version) < Version(OLDEST):
        raise UserError(f"{supported}, which lacks what it needs; run {install}")
    if Version(version).release >= Version(FIRST_UNTESTED).release:
        warnings.warn(f"{supported}: errors or wrong results are possible; if in doubt, {install}", stacklevel=2)
